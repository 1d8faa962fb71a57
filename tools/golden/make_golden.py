#!/usr/bin/env python3
# mypy: disable-error-code="import-not-found,import-untyped,no-any-return"
"""Record golden tensors from the original code into tests/golden/data.

    python tools/golden/make_golden.py                 # all of them, from the inputs already stored there
    python tools/golden/make_golden.py --only encoder  # one file
    python tools/golden/make_golden.py --only prompt_ids --qwen3-tokenizer tokenizer.json

It needs the reference environment (tests/golden/README.md), never this package: the
recorded numbers are what torch, funasr and transformers compute. Weights travel with
the activations, because random streams differ between library versions. The
recording and the statistics of the front end are copied from the existing
features.safetensors unless `--speech` and `--mvn` name new ones.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from golden_canary import make_canary
from golden_nano import make_nano, make_nano_prompt_ids
from golden_sensevoice import make_sensevoice
from golden_stages import DATA, make_adaptor, make_decoder, make_encoder, make_features
from golden_text import make_generation, make_prompt_ids


def main() -> None:
    """Parse the command line and write the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = (
        "features",
        "encoder",
        "adaptor",
        "decoder",
        "generation",
        "lora",
        "nano",
        "canary",
        "sensevoice",
        "prompt_ids",
        "nano_prompt_ids",
    )
    parser.add_argument("--only", choices=names, action="append", help="write this file (repeatable; default: all)")
    parser.add_argument("--speech", type=Path, help="recording to cut the excerpt from, 16 kHz mono")
    parser.add_argument("--mvn", type=Path, help="SenseVoiceSmall's am.mvn")
    parser.add_argument("--qwen3-tokenizer", type=Path, help="real tokenizer.json, beside its tokenizer_config.json")
    options = parser.parse_args()
    makers = dict(encoder=make_encoder, adaptor=make_adaptor, decoder=make_decoder, generation=make_generation)
    makers |= dict(nano=make_nano, canary=make_canary, sensevoice=make_sensevoice)
    spelled = dict(prompt_ids=make_prompt_ids, nano_prompt_ids=make_nano_prompt_ids)
    DATA.mkdir(parents=True, exist_ok=True)
    for name in options.only or names:
        if name == "features":
            make_features(options.speech, options.mvn)
        elif name in spelled:
            if options.qwen3_tokenizer is not None:
                spelled[name](options.qwen3_tokenizer)
            else:
                print(f"{name}.json left as it is: it needs --qwen3-tokenizer")
        elif name == "lora":
            from golden_lora import make_lora  # the one file that needs PEFT

            make_lora()
        else:
            makers[name]()


if __name__ == "__main__":
    main()
