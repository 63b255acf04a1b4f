"""What was read and what of it was of no use, counted by reason, with the first places of each; and when to stop."""

from collections import Counter

from moelet.errors import UserError
from moelet.text.documents import Cursor, Skipped

HARMLESS = {"empty"}  # there is nothing in it to lose
FEW = 10  # rows of no use that stop nothing in a pass: of a small text they are a large share
PLACES = 3  # of each reason, to look at
TOLD = 3  # reasons that a message has
DOCUMENTS, CUT, MIX = "documents", "cut in pieces", "mix "  # what else is counted: MIX begins a name


class Tally:
    """Counts by reason, and where the first rows of each reason are, as a cursor holds them."""

    def __init__(self, cursor: Cursor) -> None:
        self.counts: Counter[str] = Counter(cursor["counts"])
        self.places = {reason: list(places) for reason, places in cursor.get("places", {}).items()}

    def skip(self, item: Skipped) -> None:
        self.counts[item.reason] += 1
        places = self.places.setdefault(item.reason, [])
        if len(places) < PLACES and item.where not in places:  # a later pass comes to the same rows again
            places.append(item.where)

    def require_mostly_good(self, allowed: float, passes: int) -> None:
        """Raise UserError where more than that share of the rows is of no use, the last of `passes` only begun."""
        skipped = skipped_of(self.counts)
        bad = {reason: count for reason, count in skipped.items() if reason not in HARMLESS}
        count, rows = sum(bad.values()), self.counts[DOCUMENTS] + sum(skipped.values())
        if count <= max(FEW * passes, allowed * rows):
            return
        most = sorted(bad, key=lambda reason: (-bad[reason], reason))[:TOLD]
        told = "; ".join(
            f"{bad[reason]:,} {reason} (first {', '.join(self.places.get(reason, []))})" for reason in most
        )
        raise UserError(
            f"{count:,} of {rows:,} rows read so far can't be used ({count / rows:.1%}): {told}. data.bad_rows allows "
            f"{allowed:.1%}. Mend the text, or raise data.bad_rows, which a resume may change."
        )


def skipped_of(counts: dict[str, int]) -> dict[str, int]:
    """Return the rows of no use, by reason."""
    return {name: count for name, count in counts.items() if name not in (DOCUMENTS, CUT) and not name.startswith(MIX)}
