"""A base model that accelerate has laid out over devices, steered: `python examples/scripts/device_map.py org/model`.

`device_map="auto"` puts layers where there is room: on several GPUs, the CPU, the disk. A value head goes where the
scores come out, which is the device of the output layer.
"""

from __future__ import annotations

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from mavis_logits import MavisLogitsProcessor


def main() -> None:
    """Answer one prompt."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--values", help="a head's or bundle's id or folder; without it, words")
    parser.add_argument("--device-map", default="auto")
    parser.add_argument("--prompt", default="How do I make good tea?")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(
        options.model, device_map=options.device_map, offload_folder="offloaded"
    ).eval()
    print({place: str(device) for place, device in getattr(model, "hf_device_map", {"": model.device}).items()})
    words = {} if options.values else {"objectives": {"short": "Answer in few words."}}
    mavis = MavisLogitsProcessor.from_pretrained(options.values, model=model, tokenizer=tokenizer, **words)
    inputs = tokenizer(options.prompt, return_tensors="pt").to(model.device)
    output = model.generate(**inputs, do_sample=True, max_new_tokens=options.max_new_tokens, logits_processor=[mavis])
    print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    print(f"{mavis.stats.kl:.1f} nats over {mavis.stats.steps} tokens")


if __name__ == "__main__":
    main()
