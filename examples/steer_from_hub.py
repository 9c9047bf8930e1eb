"""SmolLM2 steered by a bundle on the Hub, in three ways: `python examples/steer_from_hub.py org/steering-bundle`."""

import sys

from transformers import pipeline

import mavis_logits.pipeline  # noqa: F401 (registers the task)
from mavis_logits import MavisLogitsProcessor
from mavis_logits.demo import load_smollm2

bundle, (model, tokenizer) = sys.argv[1], load_smollm2()
chat = [{"role": "user", "content": "How do I make good tea?"}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
with MavisLogitsProcessor.from_pretrained(bundle, model=model, tokenizer=tokenizer) as mavis:
    by_processor = model.generate(**inputs, max_new_tokens=24, logits_processor=[mavis])
by_code = model.generate(**inputs, max_new_tokens=24, custom_generate=bundle, trust_remote_code=True)
for ids in (by_processor, by_code):
    print(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
pipe = pipeline("mavis-text-generation", model=model, tokenizer=tokenizer, value_models=bundle)
print(pipe(chat, max_new_tokens=24, do_sample=False, return_full_text=False)[0]["generated_text"])
