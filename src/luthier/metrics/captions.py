"""The caption metrics as the COCO and E2E scripts compute them: METEOR, CIDEr, and their own ROUGE-L.

All three read texts cut by Stanford's PTB tokenizer (lower-cased, punctuation removed). It and METEOR are Java programs that
come with pycocoevalcap (the extra `captions`); each is started once for all texts of a call.
"""

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from luthier.errors import UserError
from luthier.metrics.lcs import lcs_length
from luthier.metrics.resample import Floats
from luthier.metrics.score import Score, check_paired, mean_score

# What the scripts drop after tokenizing (-lrb- stays, for they compare before lower-casing).
_DROPPED = frozenset(
    ["''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
_LINE_ENDS = re.compile(r"[\r\n\v\f\x1c-\x1e\x85\u2028\u2029]")

# METEOR 1.5 for English: balance of precision and recall, shape and weight of the penalty for broken order, weight of
# content words against function words; and of matches: exact, stem, synonym, paraphrase.
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75
_MATCHES = np.array([1.0, 0.6, 0.8, 0.6])
_MOST_PAIRS = 50_000  # of equal words; about 2,000 words of prose a side. Ten times that takes minutes and gigabytes.


def needs_captions() -> None:
    """Raise UserError naming what is missing: the package or Java."""
    if find_spec("pycocoevalcap") is None:
        raise UserError(
            "meteor, cider and rougeL_caption need the package pycocoevalcap, which is not installed: "
            "pip install 'luthier[captions]'."
        )
    if shutil.which("java") is None:
        raise UserError(
            "meteor, cider and rougeL_caption need Java for the PTB tokenizer and METEOR, and there is no `java` on the "
            "PATH: install a Java runtime (version 8 or later; Debian: apt-get install default-jre-headless)."
        )


def meteor(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """METEOR 1.5 (Denkowski and Lavie 2014), English, from statistics summed over the examples as its own total is.

    Texts of several thousand words are read up to where its aligner can follow; the signature counts them (`shortened`).
    """
    whole = list(zip(*_tokenized(predictions, references), strict=True))
    read = [_shortened(one, row) for one, row in whole]
    lines = [" ||| ".join(["SCORE", *row, one]) for one, row in read]
    folder = _package() / "meteor"
    found = _java(["-Xmx2G", "-jar", str(folder / "meteor-1.5.jar"), *["-", "-", "-stdio", "-l", "en", "-norm"]], lines)
    rows = np.array([[float(figure) for figure in line.split()] for line in found])
    ours_whole, theirs_whole = rows[:, 21] == rows[:, 0], rows[:, 22] == rows[:, 1]
    rows[ours_whole & theirs_whole & (rows[:, 20] == 1), 20] = 0  # a text matched in one piece is not broken at all
    shortened = sum(ours != theirs for ours, theirs in zip(whole, read, strict=True))
    signature = f"metric:meteor|version:1.5|lang:en|norm:yes|shortened:{shortened}|{_signed(references, 'best')}"
    return Score(meteor_from_sums(rows, 1), signature, statistics=rows, formula=meteor_from_sums)


def meteor_from_sums(sums: Floats, examples: int) -> Floats:
    """METEOR from its 23 summed statistics: lengths, function words, matches by kind, chunks (0 for a whole match), matched words."""
    ours, theirs, our_function, their_function = (sums[..., place] for place in range(4))
    # (..., kind of match, [content and function words] of [prediction and reference])
    matches = np.moveaxis(sums[..., 4:20].reshape(*sums.shape[:-1], 4, 4), -2, -1) @ _MATCHES
    precision = _share(_weighted(matches[..., 0], matches[..., 2]), _weighted(ours - our_function, our_function))
    recall = _share(_weighted(matches[..., 1], matches[..., 3]), _weighted(theirs - their_function, their_function))
    chunks, our_matched, their_matched = (sums[..., place] for place in range(20, 23))
    broken = _share(chunks, (our_matched + their_matched) / 2)
    some = (precision > 0) & (recall > 0)
    mean = np.where(some, 1 / ((1 - _ALPHA) / np.where(some, precision, 1) + _ALPHA / np.where(some, recall, 1)), 0.0)
    found: Floats = mean * (1 - _GAMMA * broken**_BETA)
    return found


def _shortened(prediction: str, references: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """Both sides' first words, as many as METEOR's aligner can bear: it weighs every pair of equal words."""
    ours, theirs = prediction.split(" "), [one.split(" ") for one in references]
    length = max(map(len, (ours, *theirs)))
    while any(_pairs(ours[:length], one[:length]) > _MOST_PAIRS for one in theirs):
        length = length * 3 // 4
    return " ".join(ours[:length]), tuple(" ".join(one[:length]) for one in theirs)


def _pairs(ours: list[str], theirs: list[str]) -> int:
    if len(ours) * len(theirs) <= _MOST_PAIRS:
        return 0
    times = Counter(theirs)
    return sum(count * times[word] for word, count in Counter(ours).items())


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """CIDEr (Vedantam et al. 2015) as the scripts have it: n-grams weighted by rarity in the references, 0 to 10.

    Document frequencies are those of the reference set, and stay fixed when examples are resampled. One example alone
    scores 0: every n-gram is in all documents.
    """
    ours, theirs = _tokenized(predictions, references)
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    scorer = CiderScorer(n=4, sigma=6.0)
    for one, row in zip(ours, theirs, strict=True):
        scorer += (one, list(row))
    _, values = scorer.compute_score()
    return mean_score(values, f"metric:cider|n:4|sigma:6|weights:references|{_signed(references, 'mean')}")


def rouge_l_caption(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """ROUGE-L as the caption scripts have it: best precision and best recall over the references, beta 1.2, no stems."""
    ours, theirs = _tokenized(predictions, references)
    values, precisions, recalls = [], [], []
    for one, row in zip(ours, theirs, strict=True):
        words = one.split(" ")
        common = [(lcs_length(reference.split(" "), words), len(reference.split(" "))) for reference in row]
        precision, recall = max(hits for hits, _ in common) / len(words), max(hits / length for hits, length in common)
        precisions.append(precision)
        recalls.append(recall)
        values.append(
            (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision) if precision and recall else 0.0
        )
    signature = f"metric:rougeL_caption|beta:1.2|{_signed(references, 'best of each part')}"
    return mean_score(values, signature, precision=precisions, recall=recalls)


@lru_cache(maxsize=16)
def ptb(texts: tuple[str, ...]) -> tuple[str, ...]:
    """Cut texts by Stanford's PTB tokenizer as the caption scripts do; the last few calls are remembered."""
    needs_captions()
    lines = [_LINE_ENDS.sub(" ", text) for text in texts]
    jar = _package() / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    found = _java(["-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"], lines)
    return tuple(" ".join(word for word in line.rstrip().split(" ") if word not in _DROPPED) for line in found)


def _tokenized(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    check_paired(predictions, references)
    theirs = iter(ptb(tuple(one.replace("|||", "") for row in references for one in row)))
    return ptb(tuple(one.replace("|||", "") for one in predictions)), [
        tuple(next(theirs) for _ in row) for row in references
    ]


def _java(arguments: Sequence[str], lines: Sequence[str]) -> list[str]:
    """Run a Java program of the package on lines, one answer a line."""
    with tempfile.TemporaryDirectory(prefix="luthier-") as folder:
        done = subprocess.run(
            ["java", "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8", *arguments],
            input="".join(line + "\n" for line in lines).encode(errors="replace"),
            capture_output=True,
            cwd=folder,
        )
    found = done.stdout.decode(errors="replace").split("\n")[: len(lines)]
    if done.returncode or len(found) != len(lines) or (lines and not done.stdout):
        said = done.stderr.decode(errors="replace").strip().split("\n")[-1]
        raise UserError(f"The Java program {Path(arguments[-1]).name} failed on {len(lines)} texts: {said[:300]}")
    return found


def _package() -> Path:
    spec = find_spec("pycocoevalcap")
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))


def _signed(references: Sequence[Sequence[str]], several: str) -> str:
    most = max(map(len, references))
    return f"tokens:ptb-3.4.1|refs:{most}|several:{several}|pycocoevalcap:{version('pycocoevalcap')}"


def _weighted(content: Floats, function: Floats) -> Floats:
    return _DELTA * content + (1 - _DELTA) * function


def _share(part: Floats, whole: Floats) -> Floats:
    found: Floats = np.where(whole > 0, part / np.where(whole > 0, whole, 1), 0.0)
    return found
