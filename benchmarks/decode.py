"""How much longer decoding takes when it is steered: both sides in one run, as ratios to plain `generate`.

Compared are plain sampling, steering by value heads and value models through this library's processor and strategy, and
the schemes of other implementations, written as plain baselines (`schemes.py`). `cases.py` says what is measured when.
All variants take turns, so that a machine which slows down slows all of them; every round has other prompts and gives
one ratio. Beside each stands the ratio that both would have at the limits of this machine (`roofline.py`).

Run it on a machine that does nothing else. Results are added to docs/results/decode.json after every setting, and what
stands there already is not measured again:

    python benchmarks/decode.py                             # the main comparison, about 15 minutes on two cores
    python benchmarks/decode.py --suite full                # everything, about 40 minutes more
    python benchmarks/decode.py --suite head dtype --again  # some sections anew
    python benchmarks/decode.py --device cuda --suite full  # shapes of Llama-2-7B and TinyLlama-1.1B, random weights
    python benchmarks/decode.py --device cuda --suite full --dry-run        # the same, tiny, on a CPU, in seconds
    python benchmarks/decode.py --new-tokens 4 --rounds 1 --out runs/quick  # a quick look
"""

from __future__ import annotations

import argparse
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

from cases import SUITES, Case, cpu_cases, dry, gpu_cases
from measuring import PLAIN, measure
from report import Report
from roofline import Ceilings
from row import key, make_row
from setups import ROOT, Setup, llama_shapes, smollm2
from variants import VARIANTS, mean_candidates, roofline

_MANY_ROWS = 512  # of a matrix product that is limited by throughput alone


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is asked for and not known yet, and write it down."""
    options = parser().parse_args(argv)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    cases = selected(options)
    report = Report(Path(options.out or ROOT / ("runs/dry" if options.dry_run else "docs/results")))
    try:
        setup = make_setup(options)
        ceilings = Ceilings(setup.device, 1 << 22, 0.001) if options.dry_run else Ceilings(setup.device)
        report.enter(options.device, environment(setup, ceilings), options.again)
    except (ImportError, RuntimeError, ValueError) as error:
        print(f"decode.py: {error}", file=sys.stderr)
        return 2
    for case in cases:
        run(setup, case, report, ceilings, options)
    report.publish()
    print((report.folder / "decode.md").read_text(encoding="utf-8"))
    return 0


def parser() -> argparse.ArgumentParser:
    """Return the parser of the benchmark's options."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    add("--suite", nargs="+", default=["quick"], choices=list(SUITES), help="what to measure (default: quick)")
    add("--batches", type=int, nargs="+", help="only these numbers of prompts at once")
    add("--variants", metavar="REGEX", help="only variants with this in their name")
    add("--rounds", type=int, help="in place of each case's own number of rounds")
    add("--new-tokens", type=int, help="in place of each case's own number of tokens")
    add("--again", action="store_true", help="measure anew what has been measured")
    add("--device", default="cpu", choices=["cpu", "cuda"], help="cuda has its own models (default: %(default)s)")
    add("--dry-run", action="store_true", help="tiny random models on the CPU: does all of it run?")
    add("--out", help="folder for decode.json, .md and .png (default: docs/results; of a dry run: runs/dry)")
    return result


def selected(options: argparse.Namespace) -> list[Case]:
    """The cases of the suites, as the other options have them."""
    sections = [section for suite in options.suite for section in SUITES[suite]]
    cases = gpu_cases() if options.device == "cuda" else cpu_cases()
    cases = [case for case in cases if case.setting.section in sections]
    if options.batches:
        cases = [case for case in cases if case.setting.batch in options.batches]
    if options.variants:
        named = [[name for name in case.variants if re.search(options.variants, name)] for case in cases]
        cases = [replace(case, variants=own) for case, own in zip(cases, named, strict=True) if own]
    if options.dry_run:
        cases = dry(cases)
    if options.new_tokens:
        cases = [replace(case, setting=replace(case.setting, new_tokens=options.new_tokens)) for case in cases]
    if options.rounds:
        cases = [replace(case, rounds=options.rounds) for case in cases]
    return cases


def make_setup(options: argparse.Namespace) -> Setup:
    """The models to run on.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    if options.dry_run:
        return llama_shapes("cpu", dry_run=True)
    if options.device == "cpu":
        return smollm2()
    if not torch.cuda.is_available():
        raise ValueError("--device cuda needs a CUDA GPU, and torch sees none; --dry-run tries the same on the CPU")
    return llama_shapes("cuda")


def run(setup: Setup, case: Case, report: Report, ceilings: Ceilings, options: argparse.Namespace) -> None:
    """Measure a case, as far as the report does not know it, and add it there."""
    device, setting = options.device, case.setting
    missing = [name for name in case.variants if options.again or key(device, name, setting) not in report.rows]
    if not missing:
        return
    arguments = {name: VARIANTS[name].arguments(setup, setting) for name in missing}
    rounds = {name: min(case.rounds, VARIANTS[name].rounds or case.rounds) for name in missing}
    measured = measure(setup, setting, arguments, rounds)
    candidates = {name: mean_candidates(setup, setting, name) for name in measured}
    least = {name: roofline(setup, setting, name, candidates[name], ceilings) for name in measured}
    report.add(
        make_row(device, name, setting, own, candidates[name], least[name], least[PLAIN])
        for name, own in measured.items()
    )
    report.save()


def environment(setup: Setup, ceilings: Ceilings) -> dict[str, Any]:
    """What is measured on."""
    shape = (setup.model.config.hidden_size, setup.model.config.intermediate_size)
    dtypes = dict.fromkeys([setup.model.dtype, torch.float32, torch.bfloat16])
    return {
        "machine": machine(setup.device),
        "versions": {name: version(name) for name in ("torch", "transformers", "mavis-logits")},
        "model": setup.name,
        "dtype": str(setup.model.dtype).removeprefix("torch."),
        "ceilings": {
            "bandwidth": ceilings.bandwidth(),
            "flops": {str(d).removeprefix("torch."): ceilings.throughput(_MANY_ROWS, shape, d) for d in dtypes},
        },
    }


def machine(device: torch.device) -> str:
    """The GPU, or the processor and the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return f"{found[1] if found else platform.processor()}, {torch.get_num_threads()} threads"


if __name__ == "__main__":
    sys.exit(main())
