"""Count the broken examples of a run, log the first ones, and stop data that has too many."""

from bisect import bisect_right
from collections.abc import Sequence

from lwm.core.errors import InputError
from lwm.core.progress import say
from lwm.data.examples.examples import Report
from lwm.data.rows.draws import Shares, Split

_LOGGED = 10  # broken examples that are logged one by one


class BrokenLog:
    """Hold the broken examples that one process has read, each counted once.

    Args:
        whole: whether broken examples are compared with all of their data set, since a held-out
            split is too small to judge by itself, and not with what this process has read.
        share: this process's share of the rows of a batch.
        max_broken: share of the examples of each data set that may be broken.
    """

    def __init__(
        self,
        splits: Sequence[Split],
        shares: Shares,
        *,
        whole: bool,
        share: float,
        max_broken: float,
    ) -> None:
        self._splits, self._whole = splits, whole
        self._weights = [slots / sum(shares.slots) for slots in shares.slots]
        self._share, self._max_broken = share, max_broken
        self._broken: list[set[int]] = [set() for _ in splits]
        self._first_of: dict[int, Report] = {}  # by split number
        self.first: list[Report] = []
        """The first reports."""

    @property
    def count(self) -> int:
        """Return the number of distinct broken examples."""
        return sum(map(len, self._broken))

    def add(self, reports: Sequence[Report], drawn: int) -> None:
        """Add reports; raise InputError if a data set has too many broken examples.

        Args:
            drawn: examples that this process has read so far.
        """
        starts = [split.before for split in self._splits]
        changed = set()
        for report in reports:
            number = bisect_right(starts, report.example) - 1
            changed.add(number)
            if report.example in self._broken[number]:
                continue
            self._broken[number].add(report.example)
            self._first_of.setdefault(number, report)
            if len(self.first) < _LOGGED:
                self.first.append(report)
                say(f"skipped a broken example: {report}")
            elif self.count == _LOGGED + 1:
                say("further broken examples are counted but not logged")
        for number in sorted(changed):
            self._require_few(number, drawn)

    def _require_few(self, number: int, drawn: int) -> None:
        split, broken = self._splits[number], len(self._broken[number])
        read = len(split.source)
        if not self._whole:
            # A process reads its share in the first pass. Each pass has another order, so in later
            # passes the process also reads examples from the shares of others.
            count = split.order.count
            read = min(count, max(count * self._share, drawn * self._weights[number]))
        if broken > self._max_broken * read:
            name = split.name and f" of the data set {split.name!r}"
            raise InputError(
                f"{broken} of {read:.0f} examples{name} are broken, more than max_broken "
                f"({self._max_broken:g}) allows, the first of them {self._first_of[number]}; "
                "repair the data or raise --data.max-broken"
            )
