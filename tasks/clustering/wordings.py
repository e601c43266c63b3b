"""All wordings of a recorded constitution's principles, of which its file lists a few."""

from __future__ import annotations

from collections import defaultdict

from constitutions.constitution import Constitution, load
from tasks.record.record import Attempt
from tasks.rows import ClusterRow

TABLE = "clusters"


def with_wordings(attempt: Attempt) -> Constitution:
    """The constitution of an attempt of `cluster` or `review`, with every wording as a member.

    Those that the file does not list are in the attempt's table `clusters`. An earlier version
    listed all of them and recorded no such table of a review. SAMI's `write` has no wordings of
    its own: its constitution is as in its file.

    Raises:
        UserError: a file is not what the attempt wrote.
    """
    found = load(attempt.path("constitution.yaml"))
    listed = all(p.wordings == len(p.members) for p in found.principles)
    if listed or attempt.stage == "write":
        return found
    members: defaultdict[int, list[str]] = defaultdict(list)
    for row in attempt.read(TABLE, ClusterRow):
        members[row.cluster].append(row.principle)
    principles = [
        p.model_copy(update={"members": tuple(members[n]) or p.members})
        for n, p in enumerate(found.principles)
    ]
    return found.model_copy(update={"principles": tuple(principles)})
