# mypy: disable-error-code="import-not-found,import-untyped,no-any-return,misc"
"""Golden texts of SenseVoiceSmall: pieces, tags, alignments, and funasr's own recogniser from features to words.

A tiny model full of noise would only say nonsense, whose pieces nobody would ever tokenise that way again, as the
original does for its times. So the weights stay noise and the *features* are trained until the model says what was
meant, tags included.
"""

from __future__ import annotations

import importlib.metadata
import io
import random
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import reference as ref
import sentencepiece
import torch
from funasr.models.sense_voice.utils.ctc_alignment import ctc_forced_align
from funasr.tokenizer.sentencepiece_tokenizer import SentencepiecesTokenizer
from funasr.utils.postprocess_utils import rich_transcription_postprocess
from golden_stages import DATA, ENCODER, SEED, Tensors, encoder_model, fingerprint, numpy, save, sources, weights
from safetensors.numpy import load_file

TAGS = [
    "<|zh|>", "<|en|>", "<|yue|>", "<|ja|>", "<|ko|>", "<|nospeech|>", "<|HAPPY|>", "<|SAD|>", "<|ANGRY|>",
    "<|NEUTRAL|>", "<|EMO_UNKNOWN|>", "<|Speech|>", "<|BGM|>", "<|Laughter|>", "<|Event_UNK|>", "<|withitn|>",
    "<|woitn|>",
]  # fmt: skip
# What the stand-in for the real vocabulary is trained on; it can spell the utterances below.
CORPUS = [
    "我想问我在滨海新区有房", "今天天气很好，我们去公园吧。", "好好好，谢谢你！", "the cat sat on the mat",
    "hello there, my friend.", "don't stop now", "we count to 12 and 345", "こんにちは世界", "안녕하세요 세계",
] * 6  # fmt: skip
# Tags, words, rows, language asked for, ITN.
UTTERANCES: list[tuple[str, str, int, str, bool]] = [
    ("<|zh|><|NEUTRAL|><|Speech|><|woitn|>", "我想问我在滨海新区有房", 30, "auto", False),
    ("<|en|><|HAPPY|><|BGM|><|withitn|>", " hello there, the cat sat.", 34, "en", True),
    ("<|ja|><|EMO_UNKNOWN|><|Laughter|><|woitn|>", "こんにちは", 17, "auto", False),
    ("<|zh|><|SAD|><|Speech|><|withitn|>", "好好好，谢谢你！", 25, "zh", True),
    ("<|nospeech|><|EMO_UNKNOWN|><|Event_UNK|><|woitn|>", "", 9, "nospeech", False),
]
MODEL: dict[str, Any] = dict(
    input_size=60, output_size=64, attention_heads=4, linear_units=96, num_blocks=3, tp_blocks=2, kernel_size=11,
    sanm_shift=0,
)  # fmt: skip
MARGIN = 0.05  # in every row the best symbol leads by this much, so that rounding cannot change a text
VOCABULARIES: dict[str, dict[str, Any]] = {
    "tags": dict(vocab_size=200, user_defined_symbols=TAGS),
    "controls": dict(vocab_size=150, control_symbols=TAGS[:3], remove_extra_whitespaces=False),
    "bytes": dict(vocab_size=400, byte_fallback=True, unk_surface="[?]", user_defined_symbols=["▁", "▁▁"]),
    "bytes_bare": dict(vocab_size=400, byte_fallback=True, add_dummy_prefix=False, remove_extra_whitespaces=False),
}  # fmt: skip
BYTES = (0xE4, 0xBD, 0xA0, 0xC0, 0xED, 0xF0, 0x9F, 0x98, 0x8A, 0xF5, 0x41, 0xC2, 0x80, 0xFF, 0xE0, 0xEF, 0xBB, 0xBF)


def train(**settings: Any) -> bytes:
    """Train a small vocabulary and return its .model file."""
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=content, model_type="bpe", hard_vocab_limit=False,
        normalization_rule_name="identity", character_coverage=1.0, minloglevel=2, **settings,
    )  # fmt: skip
    return content.getvalue()


def decoded_pieces(model: bytes, stream: random.Random) -> list[tuple[list[int], str]]:
    """Return id sequences, the odd ones among them drawn more often, with the text that sentencepiece gives them."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    every = list(range(processor.GetPieceSize()))
    odd = [i for i in every if not processor.IdToPiece(i).isalnum()]
    spelled = {processor.IdToPiece(i): i for i in every}
    raw = [spelled[name] for value in BYTES if (name := f"<0x{value:02X}>") in spelled]
    cases = [processor.EncodeAsIds(text) for text in (*CORPUS[:9], "  two  spaces ", "未见 Ω €")]
    for _ in range(150):
        pool = stream.choice([every, odd, raw or odd])
        cases.append([stream.choice(pool) for _ in range(stream.randint(0, 7))])
    return [(ids, processor.DecodeIds(ids)) for ids in cases]


class Recorder(SentencepiecesTokenizer):
    """funasr's tokenizer, which also notes the ids that it was asked to decode."""

    def __init__(self, path: str) -> None:
        """Open the .model file."""
        super().__init__(path)
        self.seen: list[list[int]] = []

    def decode(self, line: list[int], **kwargs: Any) -> str:
        """Note and decode."""
        self.seen.append(list(line))
        return super().decode(line, **kwargs)


def spread(ids: Sequence[int], rows: int, stream: random.Random) -> list[int]:
    """Return a path (rows,) that spells ids: some stay two rows, blanks stand here and there and between doubles."""
    path: list[int] = []
    for place, symbol in enumerate(ids):
        if place and ids[place - 1] == symbol:
            path.append(0)
        path += [symbol] * stream.choice([1, 1, 2])
        path += [0] * stream.choice([0, 0, 1])
    if len(path) > rows:
        raise SystemExit(f"{len(ids)} symbols took {len(path)} of {rows} rows: give the utterance more")
    before = stream.randint(0, rows - len(path))
    return [0] * before + path + [0] * (rows - len(path) - before)


def queries(model: Any, language: str, use_itn: bool) -> torch.Tensor:
    """Return the rows of the query table that inference puts first."""
    return torch.tensor([[model.lid_dict[language], 1, 2, model.textnorm_dict["withitn" if use_itn else "woitn"]]])


def lead(scores: torch.Tensor, path: torch.Tensor) -> float:
    """Return by how much the symbols of a path (R,) lead in scores (R, V), in the row where it is least."""
    chosen = scores.gather(1, path[:, None])[:, 0]
    rivals = scores.scatter(1, path[:, None], float("-inf")).max(dim=1).values
    return float((chosen - rivals).min())


def teach(model: Any, path: list[int], rows: int, language: str, use_itn: bool, seed: int) -> torch.Tensor:
    """Train features (rows, F) until the model's best symbols are `path`, query rows first."""
    features = torch.randn(1, rows, MODEL["input_size"], generator=torch.Generator().manual_seed(seed))
    features.requires_grad_()
    target = torch.tensor(path)
    optimiser = torch.optim.Adam([features], lr=0.05)
    with torch.no_grad():
        asked = model.embed(queries(model, language, use_itn))
    for step in range(1500):
        states, _ = model.encoder(torch.cat([asked, features], dim=1), torch.tensor([rows + 4]))
        scores = model.ctc.log_softmax(states)[0]
        if lead(scores, target) > 4 * MARGIN:
            print(f"  said after {step} steps")
            return features.detach()[0]
        optimiser.zero_grad()
        (-scores.gather(1, target[:, None]).sum()).backward()
        optimiser.step()
    raise SystemExit("the features do not learn what to say: choose another seed")


def recognise(
    model: Any, tokenizer: Recorder, features: Iterable[torch.Tensor], **options: Any
) -> list[dict[str, Any]]:
    """Run funasr's inference on one item or a batch and note ids, text and, if asked for, times."""
    items = list(features)
    lengths = torch.tensor([len(item) for item in items])
    padded = 3.0 * torch.randn(
        len(items), int(lengths.max()), items[0].shape[1], generator=torch.Generator().manual_seed(5)
    )
    for place, item in enumerate(items):
        padded[place, : len(item)] = item
    tokenizer.seen.clear()
    options |= dict(key=[str(i) for i in range(len(items))], tokenizer=tokenizer, data_type="fbank", device="cpu")
    results, _ = model.inference(padded, lengths, **options)
    return [
        {"ids": ids, "text": result["text"], "times_ms": result.get("timestamp"), "words": result.get("words")}
        for ids, result in zip(tokenizer.seen, results, strict=True)
    ]


def margin_of(model: Any, features: torch.Tensor, language: str, use_itn: bool) -> float:
    """Return the smallest lead of the best symbol over all rows."""
    rows = torch.cat([model.embed(queries(model, language, use_itn)), features[None]], dim=1)
    states, _ = model.encoder(rows, torch.tensor([rows.shape[1]]))
    best = model.ctc.log_softmax(states)[0].topk(2, dim=1).values
    return float((best[:, 0] - best[:, 1]).min())


def make_speech(out: Tensors, vocabulary: bytes) -> dict[str, Any]:
    """Record what funasr's SenseVoiceSmall says of taught features, alone, in a batch, and under other queries."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=vocabulary)
    config = MODEL | {"vocab_size": processor.GetPieceSize()}
    model = encoder_model(config, SEED + 300)
    model.emo_dict["unk"] = processor.PieceToId("<|EMO_UNKNOWN|>")
    out |= weights(model)
    stream = random.Random(SEED)
    said = []
    for place, (tags, words, rows, language, use_itn) in enumerate(UTTERANCES):
        tag_ids = [processor.PieceToId(f"{tag}>") for tag in tags.split(">")[:-1]]
        word_ids = processor.EncodeAsIds(words)
        if processor.unk_id() in word_ids:
            raise SystemExit(f"the vocabulary cannot spell {words!r}")
        with torch.enable_grad():
            path = tag_ids + spread(word_ids, rows, stream)
            features = teach(model, path, rows, language, use_itn, SEED + 310 + place)
        said.append((features, tag_ids + word_ids, language, use_itn))
        out[f"speech/{place}/features"] = numpy(features)
    singles: list[dict[str, Any]] = []
    with tempfile.NamedTemporaryFile(suffix=".model") as file, torch.no_grad():
        Path(file.name).write_bytes(vocabulary)
        tokenizer = Recorder(file.name)
        for features, ids, language, use_itn in said:
            asked: dict[str, Any] = dict(language=language, use_itn=use_itn)
            (found,) = recognise(model, tokenizer, [features], output_timestamp=True, **asked)
            if found["ids"] != ids or processor.EncodeAsIds(found["text"]) != ids:
                raise SystemExit(f"{found} does not say {ids}, or is not spelled that way again")
            if margin_of(model, features, **asked) < MARGIN:
                raise SystemExit("a row is too close to call")
            (bare,) = recognise(model, tokenizer, [features], ban_emo_unk=True, **asked)
            singles.append(
                found | asked | {"banned": bare["ids"], "post": rich_transcription_postprocess(found["text"])}
            )
        # A batch asks for one language and style; what it says may be nonsense, as long as it is nonsense for sure.
        batch = {}
        for language, use_itn in (("auto", False), ("en", True), ("yue", False)):
            sure = [i for i, item in enumerate(said) if margin_of(model, item[0], language, use_itn) > MARGIN / 5]
            found_batch = recognise(model, tokenizer, [said[i][0] for i in sure], language=language, use_itn=use_itn)
            batch[f"{language}/{int(use_itn)}"] = {
                str(i): item["ids"] for i, item in zip(sure, found_batch, strict=True)
            }
            print(f"  batch {language}, ITN {use_itn}: {len(sure)} items")
    return {"config": config, "singles": singles, "batch": batch}


def make_sound(out: Tensors, vocabulary: bytes) -> dict[str, Any]:
    """Teach a new CTC head over the encoder of encoder.safetensors to say a real recording's words from its sound."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=vocabulary)
    held = load_file(DATA / "encoder.safetensors")
    held = {key: value for key, value in held.items() if key.startswith("weight/")}
    config = ENCODER | {"vocab_size": processor.GetPieceSize()}
    model = ref.build_encoder(config)
    state = {
        key.removeprefix("weight/"): torch.from_numpy(value) for key, value in held.items() if ".ctc_lo." not in key
    }
    if not all(key.startswith("ctc.") for key in model.load_state_dict(state, strict=False).missing_keys):
        raise SystemExit("encoder.safetensors holds another encoder")
    tags, words, *_ = UTTERANCES[0]
    excerpt, mvn = sources()
    features = ref.run_frontend(ref.frontend(mvn), excerpt.astype(np.float32) / 32768)
    states = ref.encode(model, features[None], [len(features)])[0]
    ids = [processor.PieceToId(f"{tag}>") for tag in tags.split(">")[:-1]] + processor.EncodeAsIds(words)
    path = torch.tensor(ids[:4] + spread(ids[4:], len(features), random.Random(SEED + 350)))
    torch.manual_seed(SEED + 351)
    head = torch.nn.Linear(states.shape[1], config["vocab_size"])
    optimiser = torch.optim.Adam(head.parameters(), lr=0.1)
    with torch.enable_grad():
        # No longer than needed: a head that is too sure of itself would forgive wrong features.
        while lead(scores := head(states), path) < 4 * MARGIN:
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(scores, path).backward()
            optimiser.step()
    model.ctc.ctc_lo.load_state_dict(head.state_dict())
    margin = margin_of(model, features, "auto", False)
    print(f"  from sound: leads by {margin:.2f}")
    with tempfile.NamedTemporaryFile(suffix=".model") as file:
        Path(file.name).write_bytes(vocabulary)
        (found,) = recognise(model, Recorder(file.name), [features], output_timestamp=True)
    if found["ids"] != ids or margin < MARGIN:
        raise SystemExit(f"{found} does not say {ids}, or not for sure")
    out["sound/ctc.ctc_lo.weight"], out["sound/ctc.ctc_lo.bias"] = numpy(head.weight), numpy(head.bias)
    return {"sound": found | {"config": config}, "encoder_weights": fingerprint(held)}


def make_alignments(out: Tensors) -> None:
    """Record forced alignments of random texts, doubled symbols among them, in noise."""
    random_numbers = np.random.default_rng(SEED + 320)
    for place, (rows, length) in enumerate(((40, 12), (25, 12), (6, 2), (3, 3), (1, 1))):
        ids = random_numbers.integers(1, 4 if rows > 20 else 12, length)
        if rows == 3:
            ids = np.array([1, 2, 1])
        scores = torch.from_numpy(random_numbers.standard_normal((1, rows, 12)).astype(np.float32) * 2).log_softmax(-1)
        path = ctc_forced_align(scores, torch.from_numpy(ids)[None], torch.tensor([rows]), torch.tensor([length]))
        out[f"align/{place}/log_probs"] = numpy(scores[0])
        out[f"align/{place}/ids"], out[f"align/{place}/path"] = ids.astype(np.int32), numpy(path[0]).astype(np.int32)


def make_rich() -> list[tuple[str, str]]:
    """Return texts full of tags with what the original makes of them."""
    stream = random.Random(SEED + 330)
    parts = [
        *TAGS,
        "<|Cough|>",
        "<|Applause|>",
        "<|Breath|>",
        "<|SURPRISED|>",
        "hello",
        " world",
        "你好",
        "。",
        " ",
        "The.",
        "😊",
    ]
    texts = ["", "no tags", "<|nospeech|><|EMO_UNKNOWN|><|Event_UNK|><|woitn|>", "<|nospeech|><|Event_UNK|>", "The."]
    texts += ["".join(tags) + words for tags, words, *_ in UTTERANCES]
    texts += ["".join(stream.choice(parts) for _ in range(stream.randint(1, 14))) for _ in range(120)]
    few = ["<|BGM|>", "<|zh|>", "<|HAPPY|>", "<|SAD|>", "a", " "]
    texts += ["<|zh|>" + "".join(stream.choice(few) for _ in range(12)) for _ in range(80)]
    return [(text, rich_transcription_postprocess(text)) for text in texts]


def make_sensevoice() -> None:
    """Write sensevoice.safetensors."""
    out: Tensors = {}
    stream = random.Random(SEED + 340)
    decoded = {}
    for name, settings in VOCABULARIES.items():
        vocabulary = train(**settings)
        out[f"vocabulary/{name}"] = np.frombuffer(vocabulary, np.uint8)
        decoded[name] = decoded_pieces(vocabulary, stream)
    speech = train(vocab_size=115, user_defined_symbols=TAGS, add_dummy_prefix=False)
    out["vocabulary/speech"] = np.frombuffer(speech, np.uint8)
    decoded["speech"] = decoded_pieces(speech, stream)
    facts = make_speech(out, speech) | make_sound(out, speech)
    make_alignments(out)
    facts["sentencepiece"] = importlib.metadata.version("sentencepiece")
    save("sensevoice", out, decoded=decoded, rich=make_rich(), **facts)
