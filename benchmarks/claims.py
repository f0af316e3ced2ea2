"""A check of every measured number, table and picture in README and documentation: each command is run again and compared.

    make claims
    python benchmarks/claims.py [--only TEXT] [--write] [--resume] [--long]

In the `PAGES`, measured results stand between two comments, the first of which names the command that prints them:

    <!-- claim: python -m examples.estimates --> ... <!-- /claim -->
    <!-- claim 1.5x: python benchmarks/sweep.py --> ... <!-- /claim -->

The passage must occur exactly once in the command's output, word for word except for line breaks and spaces, and with the same
numbers. If the comment has a factor, numbers followed by a unit of `UNITS` and rounding errors (1e-7) may differ by it, because
they depend on the machine; counts may not. Passages marked `long` are run with --long only. The exit code is 1 if a passage
does not hold.
"""

import argparse
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from operator import eq
from pathlib import Path

ROOT = Path(__file__).parent.parent
OUTPUTS = ROOT / "build" / "claims"
PAGES = (
    "README.md",
    "checkpoints/README.md",
    *sorted(page.relative_to(ROOT).as_posix() for page in (ROOT / "docs").glob("*.md")),
    "featpatch/effects/statistics.py",
    "featpatch/engine/ray.py",
)
PASSAGE = re.compile(
    r"<!-- claim(?: (?P<factor>[\d.]+)x)?(?P<long> long)?: (?P<command>.+?) -->(?P<text>.*?)<!-- /claim -->", re.DOTALL
)
TOKEN = re.compile(r"[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?|[^\W\d]+|[^\w\s]")
FENCE = re.compile(r"^```.*$", re.MULTILINE)
UNITS = {"x", "s", "ms", "us", "MB", "%", "studies", "sweeps", "million"}
LIMIT = "3h"
"""The time limit of one command."""


@dataclass(frozen=True)
class Claim:
    """A passage with the command that prints it.

    Attributes:
        page: the file that holds the passage.
        text: the passage.
        command: the command that prints it.
        factor: the factor by which numbers that depend on the machine may differ.
        long: whether the command is run with --long only.
    """

    page: str
    text: str
    command: str
    factor: float
    long: bool

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.text.split())[:80]!r}"


@dataclass(frozen=True)
class Verdict:
    """The result of comparing a passage with the output of its command.

    Attributes:
        wrong: descriptions of the differences; empty if the passage holds.
        numbers: the printed numbers, if the words of the passage were printed.
    """

    wrong: Sequence[str] = ()
    numbers: Sequence[str] = ()


def claims_of(page: str, content: str) -> list[Claim]:
    """Return all passages of a page."""
    return [
        Claim(page, found["text"], found["command"], float(found["factor"] or 1), bool(found["long"]))
        for found in PASSAGE.finditer(content)
    ]


def is_number(token: str) -> bool:
    """Return whether a token is a number and not a word."""
    return token[-1].isdecimal()


def compare(claim: Claim, output: str) -> Verdict:
    """Compare a passage with the output of its command."""
    said, printed = TOKEN.findall(FENCE.sub("", claim.text)), TOKEN.findall(output)
    words, printed_words = (["0" if is_number(token) else token for token in tokens] for tokens in (said, printed))
    starts = [at for at in range(len(printed)) if printed_words[at : at + len(said)] == words]
    if len(starts) > 1:
        return Verdict([f"the command prints its words {len(starts)} times: expected once"])
    if not starts:
        alike = [len([*takewhile(bool, map(eq, words, printed_words[at:]))]) for at in range(len(printed))] or [0]
        far = max(alike)
        ends = (said, far), (printed, alike.index(far) + far)
        return Verdict(
            ["the page says {!r}, the command prints {!r}".format(*(" ".join(of[max(0, at - 6) : at + 6]) for of, at in ends))]
        )
    found = printed[starts[0] : starts[0] + len(said)]
    wrong = [
        f"{ours} is now {theirs} (in {' '.join(said[max(0, at - 4) : at + 4])!r})"
        for at, (ours, theirs, unit) in enumerate(zip(said, found, [*said[1:], ""], strict=True))
        if ours != theirs and not near(ours, theirs, claim.factor if unit in UNITS or "e" in ours else 1)
    ]
    return Verdict(wrong, [*filter(is_number, found)])


def near(ours: str, theirs: str, factor: float) -> bool:
    """Return whether two different numbers differ by at most a factor."""
    one, other = (float(number.replace(",", "")) for number in (ours, theirs))
    return factor > 1 and one * other > 0 and max(one / other, other / one) <= factor


def write(claim: Claim, numbers: Sequence[str]) -> None:
    """Replace the numbers of a passage in its file."""
    new, path = iter(numbers), ROOT / claim.page
    text = TOKEN.sub(lambda token: next(new) if is_number(token[0]) else token[0], claim.text)
    old, new_passage = (f" {claim.command} -->{each}<!-- /claim -->" for each in (claim.text, text))
    path.write_text(path.read_text(encoding="utf-8").replace(old, new_passage), encoding="utf-8")


def output_of(command: str, resume: bool) -> tuple[str, str]:
    """Run a command and return its output and a description of its failure, if any.

    Args:
        command: the command.
        resume: whether to return the output that an earlier call of this script stored, if there is one.
    """
    kept = OUTPUTS / f"{re.sub(r'[^A-Za-z0-9]+', '-', command)}.txt"
    if resume and kept.is_file():
        return kept.read_text(encoding="utf-8"), ""
    done = subprocess.run(["timeout", LIMIT, "bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        last = " / ".join((done.stdout + done.stderr).strip().splitlines()[-3:])
        why = f"did not finish within {LIMIT}" if done.returncode == 124 else f"exited with code {done.returncode}"
        return "", f"the command {why}: {last[-400:]}"
    OUTPUTS.mkdir(parents=True, exist_ok=True)
    kept.write_text(done.stdout, encoding="utf-8")
    return done.stdout, ""


def main() -> None:
    """Run each command once and print for each of its passages whether it holds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="check only passages whose command or text contains this")
    parser.add_argument("--write", action="store_true", help="replace numbers that no longer hold")
    parser.add_argument("--resume", action="store_true", help="reuse the outputs that an earlier call stored")
    parser.add_argument("--long", action="store_true", help="also run commands that take half an hour each")
    options = parser.parse_args()
    every = [claim for page in PAGES for claim in claims_of(page, (ROOT / page).read_text(encoding="utf-8"))]
    chosen = [c for c in every if options.only in c.command + c.text and (options.long or not c.long)]
    commands, failed = list(dict.fromkeys(claim.command for claim in chosen)), 0
    for number, command in enumerate(commands, 1):
        print(f"[{number} of {len(commands)}] {command}", flush=True)
        started = time.monotonic()
        output, problem = output_of(command, options.resume)
        print(f"  {time.monotonic() - started:.0f} s", flush=True)
        for claim in (claim for claim in chosen if claim.command == command):
            verdict = Verdict([problem]) if problem else compare(claim, output)
            failed += bool(verdict.wrong)
            print("  does not hold:" if verdict.wrong else "  holds:", claim)
            print("".join(f"    {line}\n" for line in verdict.wrong), end="", flush=True)
            if options.write and verdict.wrong and verdict.numbers:
                write(claim, verdict.numbers)
    skipped = f"; {len(every) - len(chosen)} not selected" if len(chosen) < len(every) else ""
    print(f"{len(chosen) - failed} of {len(chosen)} passages hold{skipped}")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
