"""Formats to choose from, and what was written, as HTML; all texts are escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from aoft_demo.actions.export import TakenHome
from aoft_demo.actions.formats import CHECKPOINT, Format
from aoft_demo.views.notices import success
from aoft_demo.views.parts import figures, show_code
from aoft_demo.views.units import size
from aoft_deploy.artefacts.sampling import CONFIDENCE
from aoft_deploy.artefacts.verification import Report

__all__ = ["FIRST", "format_list", "next_card", "result_card", "verdict_in_words"]

FIRST = 3
"""Formats that are shown at first; the others are behind a summary."""


def format_list(formats: Sequence[Format], chosen: str = "") -> str:
    """Radio buttons of the formats; those that cannot work are disabled, with their reason.

    Args:
        formats: The formats, the usual one first.
        chosen: Key of the format to choose; the first possible one if it is not possible.
    """
    possible = [each.key for each in formats if not each.refusal]
    checked = chosen if chosen in possible else next(iter(possible), "")
    first, more = formats[:FIRST], formats[FIRST:]
    rows = "".join(_format_row(each, checked) for each in first)
    if more:
        opened = " open" if checked in [each.key for each in more] else ""
        others = "".join(_format_row(each, checked) for each in more)
        rows += f"<details{opened}><summary>{len(more)} more formats</summary>{others}</details>"
    return f'<fieldset class="formats"><legend>Format</legend>{rows}</fieldset>'


def _format_row(each: Format, checked: str) -> str:
    marks = (" checked" if each.key == checked else "") + (" disabled" if each.refusal else "")
    text = each.refusal or each.about
    runs = f"<i>runs in {escape(' or '.join(each.runtimes))}</i>" if not each.refusal else ""
    return (
        f'<label class="format{" off" if each.refusal else ""}"><input type="radio" name="format" '
        f'value="{escape(each.key)}"{marks}/><span><b>{escape(_title(each))}</b>'
        f"<small>{escape(text)} {runs}</small></span></label>"
    )


def _title(each: Format) -> str:
    if each.key == CHECKPOINT:
        return "the skill's own file (.ckpt)"
    return f"{each.to}{', 8 bits' * (each.precision == 'int8')}{', for pixels' * each.uint8}"


def result_card(done: TakenHome) -> str:
    """What was written, the proof in words, and the figures."""
    what = f"{done.path.name}, {size(done.size)}"
    if done.format.is_fleet:
        head = success(f"{len(done.tasks)} skills in one file", f"are merged and verified: {what}.")
    elif done.report is None:
        head = success(done.tasks[0], f"as training wrote it: {what}.")
    else:
        head = success(done.tasks[0], f"is merged and verified: {what}.")
    proof = f'<p class="proof">{escape(verdict_in_words(done))}</p>'
    left = ""
    if done.left_out:
        names = ", ".join(done.left_out)
        left = f'<p class="note">Left out, as the demo has no checkpoint: {escape(names)}.</p>'
    return head + proof + left + ("" if done.report is None else _figures(done, done.report))


def next_card(done: TakenHome) -> str:
    """How to make the file again, and what to do with it."""
    steps = "".join(
        f'<figure><figcaption>{escape(purpose)}<button type="button" class="copy" '
        f'aria-label="Copy: {escape(purpose)}">Copy</button></figcaption>'
        f'<pre tabindex="0">{escape(code)}</pre></figure>'
        for purpose, code in done.steps.items()
    )
    unpack = "Unpack the zip file. " if done.path.suffix == ".zip" else ""
    note = f'<p class="note">{unpack}Open a terminal in the folder of the file:</p>'
    return (
        f'<section class="next code"><h2>What to do next</h2>{note}{steps}</section>'
        f"{show_code(**done.code)}"
    )


def verdict_in_words(done: TakenHome) -> str:
    """What the verification has shown, in a few sentences."""
    report = done.report
    if report is None:
        return (
            "The file holds only what training has learnt. The shared model is not in it, so it "
            "is small; every other format is made from it."
        )
    whose = "the trained models" if done.format.is_fleet else "the trained model"
    difference = f"the largest difference of an output was {_plain(report.max_abs)}"
    sizes = ", ".join(map(str, report.batch_sizes[:-1])) + f" and {report.batch_sizes[-1]}"
    if report.tolerance is not None and report.agreement == 1:
        words = [
            f"The file gives the same answers as {whose}: on {report.images} "
            f"pictures {difference}{_alike(done, report)}."
        ]
    else:
        words = [
            f"The file gives nearly the same outputs as {whose}: on {report.images} pictures "
            f"{difference}{_alike(done, report)}."
        ]
    words.append(f"It was run in batches of {sizes}.")
    if report.agreement_shown is not None:
        words.append(
            f"That shows with {CONFIDENCE:.0%} confidence that at least "
            f"{_floor(report.agreement_shown)} of other such pictures get the same answer too."
        )
    return " ".join(words)


def _alike(done: TakenHome, report: Report) -> str:
    """How many answers agree; nothing for plain values, which have no answer to agree on."""
    if done.activation == "none":
        return ""
    if report.agreement == 1:
        count = f"{report.images} " if not done.format.is_fleet else ""
        return f", and all {count}answers agree"
    return f", and {_floor(report.agreement)} of the answers agree"


def _figures(done: TakenHome, report: Report) -> str:
    """The figures of the verification, in small print."""
    allowed = "–" if report.tolerance is None else f"{report.tolerance:.1e}"
    patterns = report.images - done.pictures
    rows = figures(
        ("largest difference of an output", f"{report.max_abs:.1e}"),
        ("as a share of the largest output", f"{report.relative:.1e}"),
        ("allowed difference", allowed),
        ("answers that agree", f"{_floor(report.agreement)}"),
        ("pictures", f"{done.pictures} from the examples, {patterns} patterns"),
        ("batch sizes", ", ".join(map(str, report.batch_sizes))),
        ("checked in", ", ".join(done.format.runtimes[:1]) or done.format.to),
    )
    return f'<details class="small"><summary>The figures</summary>{rows}</details>'


def _floor(share: float) -> str:
    """A share in per cent, rounded down, so that 100% means all."""
    tenths = int(1000 * share + 1e-6)
    return f"{tenths / 10:g}%"


def _plain(value: float) -> str:
    """A small number with two digits and without an exponent."""
    text = f"{float(f'{value:.1e}'):.12f}".rstrip("0")
    return text.rstrip(".") or "0"
