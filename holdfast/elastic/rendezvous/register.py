"""Named values that outlive any minority of the replicas that hold them. Pure: no clock, no sockets, no threads, no torch.

Every key is a CASPaxos register of its own (Rystsov, "CASPaxos: Replicated State Machines without logs", arXiv 1802.07000): a
proposer has a majority promise it a ballot, applies a change to the newest value that they have accepted, and has a majority
accept the result. Two proposers at a time cost time and nothing else. A change that is sent again is applied once: a register
remembers the last change of each session.

**Amnesia.** Replicas keep nothing on disk, so one that starts has forgotten what it promised, and may not vote before it knows
again. It *claims* a new life at the others, and adopts what a majority of them remembers. That alone is not enough: a vote of
the life before may still be under way, and be counted beside votes of replicas that learned of the new life before they gave
theirs. So every vote says which life of which replica its voter knows of, and a vote that another one of the same count knows
to be of an earlier life counts for nothing (crash-consistent quorums; Michael, Ports, Sharma, Szekeres, "Recovering Shared
Objects Without Stable Storage", DISC 2017). What was adopted is reported to proposers, and is no vote of the replica's own.

**The beginning.** A replica cannot tell its first life from its second. A job is *founded* by the lowest replica once all are
in a life that has never voted, or a majority is and the others have been silent for `found_s`. Each founding has a name, the
era, and votes of different eras are never counted together.

**What this means.** List an odd number of hosts, three or more. Any minority may die and come back empty, as often as it likes.
When a majority has lost its memory at the same time, what it knew is lost: the replicas stay silent and name each other's
plight as long as one is left that remembers; when none is, the job is founded anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import islice
from typing import TypeAlias

from holdfast.errors import ConfigError

Ballot: TypeAlias = tuple[int, str]
"""A number, and the life of the replica that proposes; lives have names of their own, so no two proposers share a ballot."""
NO_BALLOT: Ballot = (0, "")
SESSIONS_KEPT = 4096
"""A register forgets the change of a session when so many others have changed it since."""


# -- values and changes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Op:
    """Names one operation however often it is sent. A session has one at a time; numbers and attempts rise."""

    session: str
    number: int
    attempt: int = 0


Last: TypeAlias = tuple[int, int, bool, int]
"""The last operation of a session on a register: number, attempt, whether it changed anything, what it then returned."""


@dataclass(frozen=True, slots=True)
class Value:
    """`data` is None where there is nothing. `applied`: what each session did here last."""

    data: bytes | None = None
    applied: Mapping[str, Last] = field(default_factory=dict)


NOTHING = Value()
Result: TypeAlias = bytes | int | bool | None


@dataclass(frozen=True, slots=True)
class Set:
    data: bytes


@dataclass(frozen=True, slots=True)
class CompareSet:
    """As TCPStore has it: an empty `expected` fits a missing key; any other is returned where the key is missing."""

    expected: bytes
    desired: bytes


@dataclass(frozen=True, slots=True)
class Add:
    amount: int


@dataclass(frozen=True, slots=True)
class Append:
    data: bytes


@dataclass(frozen=True, slots=True)
class Delete:
    pass


@dataclass(frozen=True, slots=True)
class Get:
    pass


Change: TypeAlias = Set | CompareSet | Add | Append | Delete | Get


def apply(change: Change, value: Value, op: Op) -> tuple[Value, Result]:
    """The value after the change, and what the change returns; the same again where the operation has changed it already.

    A second attempt is remembered even where it changes nothing: the first may still be under way, and no longer can.
    """
    number, attempt, has_changed, returned = value.applied.get(op.session, (-1, 0, False, 0))
    if (number, has_changed or attempt > op.attempt) >= (op.number, True):
        return value, _result(change, value.data, returned)
    data, returned = _changed(change, value.data)
    if data == value.data and not op.attempt:
        return value, _result(change, data, returned)
    applied = {session: last for session, last in value.applied.items() if session != op.session}
    applied[op.session] = (op.number, op.attempt, data != value.data, returned)
    kept = dict(islice(applied.items(), max(0, len(applied) - SESSIONS_KEPT), None))
    return Value(data, kept), _result(change, data, returned)


def _changed(change: Change, data: bytes | None) -> tuple[bytes | None, int]:
    """The data after the change, and a number from which `_result` makes what is returned."""
    match change:
        case Set():
            return change.data, 0
        case CompareSet():
            fits = change.expected == (b"" if data is None else data)
            return (change.desired, 1) if fits else (data, 0)
        case Add():
            total = _number(data) + change.amount
            return str(total).encode(), total
        case Append():
            return (data or b"") + change.data, 0
        case Delete():
            return None, int(data is not None)
        case Get():
            return data, 0


def _result(change: Change, data: bytes | None, returned: int) -> Result:
    match change:
        case CompareSet():
            if returned:
                return change.desired
            return change.expected if data is None else data
        case Add():
            return returned
        case Delete():
            return bool(returned)
        case Get():
            return data
        case _:
            return None


def _number(data: bytes | None) -> int:
    try:
        return int(data or b"0")
    except ValueError:
        raise ConfigError(
            f"add needs a key that holds a whole number; this one holds {data[:40] if data else data!r}"
        ) from None


# -- messages ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prepare:
    era: str
    key: str
    ballot: Ballot


@dataclass(frozen=True, slots=True)
class Accept:
    era: str
    key: str
    ballot: Ballot
    value: Value


@dataclass(frozen=True, slots=True)
class Look:
    """Which ballot did you last accept for each of these?"""

    era: str
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class List:
    """Which keys do you know?"""

    era: str


@dataclass(frozen=True, slots=True)
class Claim:
    """A replica that has forgotten everything says so. `life` names this life, `birth` counts them."""

    claimant: int
    life: str
    birth: int


Request: TypeAlias = Prepare | Accept | Look | List | Claim


@dataclass(frozen=True, slots=True)
class Promise:
    ballot: Ballot
    accepted: Ballot
    value: Value


@dataclass(frozen=True, slots=True)
class Accepted:
    ballot: Ballot


@dataclass(frozen=True, slots=True)
class Refused:
    """A higher ballot has been promised."""

    ballot: Ballot
    promised: Ballot


@dataclass(frozen=True, slots=True)
class Seen:
    """The ballots of this replica's votes, in the order of the keys; None where it has only adopted what others knew."""

    ballots: tuple[Ballot | None, ...]


@dataclass(frozen=True, slots=True)
class Listed:
    keys: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Forgetful:
    """The replica has begun a life in which it has not voted yet."""

    life: str


@dataclass(frozen=True, slots=True)
class Stranger:
    """The replica votes in another era than the one that was asked for."""


@dataclass(frozen=True, slots=True)
class Founded:
    """The answer to the claim of a founder: it has nothing to remember."""

    founders: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Memory:
    """All that a replica knows, for the life that claimed it."""

    life: str
    birth: int
    registers: Mapping[str, Register]


@dataclass(frozen=True, slots=True)
class Outlived:
    """A life with this number of births is known already; claim a later one."""

    life: str
    birth: int


Body: TypeAlias = Promise | Accepted | Refused | Seen | Listed | Forgetful | Stranger | Founded | Memory | Outlived


@dataclass(frozen=True, slots=True)
class Answer:
    """`births`: for each replica the latest life that the sender knows of, its own included. `era` is empty before it votes."""

    sender: int
    era: str
    births: tuple[int, ...]
    body: Body


class ProtocolError(RuntimeError):
    """An event that the current state does not expect."""


def majority(size: int) -> int:
    return size // 2 + 1


def consistent(answers: Iterable[Answer]) -> list[Answer]:
    """Those answers that none of the others knows to be of an earlier life of their sender."""
    found = list(answers)
    return [one for one in found if all(other.births[one.sender] <= one.births[one.sender] for other in found)]


# -- a replica ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Register:
    """`voted`: this replica accepted the value itself; otherwise it adopted it when it recovered."""

    promised: Ballot = NO_BALLOT
    accepted: Ballot = NO_BALLOT
    value: Value = NOTHING
    voted: bool = True


BLANK = Register()


class Standing(Enum):
    """FORGETFUL: has not voted in this life, and asks what it must know · VOTING: knows all that it ever promised."""

    FORGETFUL = "forgetful"
    VOTING = "voting"


class Voter:
    """One replica's memory, and its right to vote. `life` is a name that no other life of any replica has."""

    def __init__(self, me: int, size: int, life: str, *, found_s: float, now_s: float) -> None:
        self.me, self.size, self.life, self.era = me, size, life, ""
        self.standing = Standing.FORGETFUL
        self.registers: dict[str, Register] = {}
        self._births, self._lives = [0] * size, [""] * size
        self._births[me], self._lives[me] = 1, life
        self._founders: tuple[str, ...] = ()
        self._found_s, self._since_s = found_s, now_s
        self._heard: dict[int, Answer] = {}

    # -- answering --

    def answer(self, request: Request) -> Answer:
        handle = _REQUESTS.get((self.standing, type(request)))
        if handle is None:
            raise ProtocolError(f"{request} is not expected while {self.standing.value}")
        foreign = self.standing is Standing.VOTING and not isinstance(request, Claim) and request.era != self.era
        body = Stranger() if foreign else handle(self, request)
        return Answer(self.me, self.era, tuple(self._births), body)

    def _prepare(self, request: Prepare) -> Body:
        known = self.registers.get(request.key, BLANK)
        if request.ballot < known.promised:
            return Refused(request.ballot, known.promised)
        self.registers[request.key] = Register(request.ballot, known.accepted, known.value, known.voted)
        return Promise(request.ballot, known.accepted, known.value)

    def _accept(self, request: Accept) -> Body:
        known = self.registers.get(request.key, BLANK)
        if request.ballot < known.promised:
            return Refused(request.ballot, known.promised)
        self.registers[request.key] = Register(request.ballot, request.ballot, request.value)
        return Accepted(request.ballot)

    def _look(self, request: Look) -> Body:
        known = [self.registers.get(key, BLANK) for key in request.keys]
        # What was adopted may have been accepted by one replica only. Counted as a vote, it would look chosen.
        return Seen(tuple(register.accepted if register.voted else None for register in known))

    def _list(self, request: List) -> Body:
        return Listed(tuple(self.registers))

    def _forgot(self, request: Request) -> Body:
        return Forgetful(self.life)

    def _witness(self, request: Claim) -> Body:
        """From here on, no vote of an earlier life of the claimant counts beside one of ours."""
        who = request.claimant
        if request.life in self._founders:
            return Founded(self._founders)
        known = self._births[who], self._lives[who]
        if request.birth < known[0] or (request.birth == known[0] and request.life != known[1]):
            return Outlived(request.life, known[0])
        self._births[who], self._lives[who] = request.birth, request.life
        return Memory(request.life, request.birth, dict(self.registers))

    # -- recovering --

    def claim(self) -> Claim:
        """What to ask all other replicas, again and again, until this one votes."""
        return Claim(self.me, self.life, self._births[self.me])

    def hear(self, answers: Mapping[int, Answer | None], now_s: float) -> None:
        """What the others answered to the last claim, None for the silent. Afterwards this replica may be voting."""
        if self.standing is not Standing.FORGETFUL:
            raise ProtocolError("a replica that votes has claimed nothing")
        self._heard = {sender: answer for sender, answer in answers.items() if answer is not None}
        for answer in self._heard.values():
            match answer.body:
                case Founded() if self.life in answer.body.founders:
                    return self._begin(answer.era, answer.body.founders)
                case Outlived() if answer.body.life == self.life:
                    self._births[self.me] = max(self._births[self.me], answer.body.birth + 1)
                case Founded() | Outlived() | Memory() | Forgetful():
                    pass
                case _:
                    raise ProtocolError(f"{answer.body} does not answer a claim")
        self._recover()
        if self.standing is Standing.FORGETFUL:
            self._found(now_s)
        return None

    def _recover(self) -> None:
        claimed = self.life, self._births[self.me]
        told = [
            (answer, answer.body)
            for answer in consistent(self._heard.values())
            if isinstance(answer.body, Memory) and (answer.body.life, answer.body.birth) == claimed
        ]
        # A majority of all, without this one: any two such sets and any count of votes have a replica in common.
        if len({answer.era for answer, _ in told}) != 1 or len(told) < min(majority(self.size), self.size - 1):
            return
        self.era, self.standing = told[0][0].era, Standing.VOTING
        for answer, memory in told:
            self._births = [max(pair) for pair in zip(self._births, answer.births, strict=True)]
            for key, theirs in memory.registers.items():
                ours = self.registers.get(key, BLANK)
                newest = max(ours, theirs, key=lambda register: register.accepted)
                promised = max(ours.promised, theirs.promised, newest.accepted)
                self.registers[key] = Register(promised, newest.accepted, newest.value, voted=False)

    def _found(self, now_s: float) -> None:
        """Begin the job, where it is this replica's turn and nobody can remember an earlier beginning."""
        lives = {sender: answer.body.life for sender, answer in self._heard.items() if isinstance(answer.body, Forgetful)}
        waited = now_s - self._since_s >= self._found_s
        enough = self.size if not waited else majority(self.size)
        if len(lives) < len(self._heard) or len(lives) + 1 < enough or min(lives, default=self.size) < self.me:
            return
        lives[self.me] = self.life
        self._begin(self.life, tuple(lives.get(who, "") for who in range(self.size)))

    def _begin(self, era: str, founders: tuple[str, ...]) -> None:
        self.era, self.standing = era, Standing.VOTING
        self._founders, self._lives = founders, list(founders)
        own = self._births[self.me]  # others may have been told of a later one than a founder's first
        self._births = [int(bool(life)) for life in founders]
        self._births[self.me] = own

    def plight(self, names: Sequence[str]) -> str:
        """Why this replica does not vote yet, with the names of those it waits for."""
        others = [who for who in range(self.size) if who != self.me]
        silent = [names[who] for who in others if who not in self._heard]
        empty = [names[who] for who in others if who in self._heard and isinstance(self._heard[who].body, Forgetful)]
        full = [names[who] for who in others if who in self._heard and isinstance(self._heard[who].body, Memory)]
        said = [f"no answer from {', '.join(silent)}"] * bool(silent)
        said += [f"{', '.join(empty)} {'has' if len(empty) == 1 else 'have'} no memory either"] * bool(empty)
        said += [f"{', '.join(full)} {'remembers' if len(full) == 1 else 'remember'} the job"] * bool(full)
        needed = min(majority(self.size), self.size - 1)
        return f"{names[self.me]} has just started and needs {needed} others that remember the job, or a new job: " + (
            "; ".join(said)
        )


_REQUESTS: dict[tuple[Standing, type], Callable[..., Body]] = {
    **{(Standing.FORGETFUL, request): Voter._forgot for request in (Prepare, Accept, Look, List, Claim)},
    (Standing.VOTING, Prepare): Voter._prepare,
    (Standing.VOTING, Accept): Voter._accept,
    (Standing.VOTING, Look): Voter._look,
    (Standing.VOTING, List): Voter._list,
    (Standing.VOTING, Claim): Voter._witness,
}


# -- a proposer --------------------------------------------------------------------------------------------------------


class Phase(Enum):
    """PREPARING, PROPOSING: waiting for votes · DONE: `result` counts · OUTBID: try a higher ballot · STRANDED: no majority."""

    PREPARING = "preparing"
    PROPOSING = "proposing"
    DONE = "done"
    OUTBID = "outbid"
    STRANDED = "stranded"


class Round:
    """One attempt at changing one register under one ballot. Send `begin()` to all, feed answers, send all what `hear` returns.

    Whatever becomes of an attempt, its change may still be found applied by a later one, and is then not applied again.
    """

    def __init__(self, size: int, era: str, key: str, ballot: Ballot, change: Change, op: Op) -> None:
        self.phase, self.outbid_by = Phase.PREPARING, ballot
        self.result: Result = None
        self._size, self._era, self._key, self._ballot = size, era, key, ballot
        self._change, self._op = change, op
        self._votes: dict[int, Answer] = {}
        self._lost: set[int] = set()

    def begin(self) -> Prepare:
        return Prepare(self._era, self._key, self._ballot)

    def hear(self, sender: int, answer: Answer | None) -> Accept | None:
        """None for a replica from which nothing will come. Raises ProtocolError for an answer to something else."""
        if answer is None or isinstance(answer.body, Forgetful | Stranger):
            self._miss(sender)
            return None
        try:
            handle = _ANSWERS[self.phase, type(answer.body)]
        except KeyError:
            raise ProtocolError(f"{answer.body} from {sender} is not expected while {self.phase.value}") from None
        body = answer.body
        assert isinstance(body, Promise | Accepted | Refused)
        if body.ballot != self._ballot:
            raise ProtocolError(f"{body} answers another round than {self._ballot}")
        return handle(self, sender, answer)

    def _miss(self, sender: int) -> None:
        self._lost.add(sender)
        hopeless = self._size - len(self._lost) < majority(self._size) or len(self._votes.keys() | self._lost) == self._size
        if hopeless and self.phase in (Phase.PREPARING, Phase.PROPOSING):
            self.phase = Phase.STRANDED

    def _promised(self, sender: int, answer: Answer) -> Accept | None:
        counted = self._count(sender, answer)
        if not counted:
            return None
        promises = [vote.body for vote in counted if isinstance(vote.body, Promise)]
        newest = max(promises, key=lambda promise: promise.accepted)
        value, self.result = apply(self._change, newest.value, self._op)
        self.phase, self._votes, self._lost = Phase.PROPOSING, {}, set()
        return Accept(self._era, self._key, self._ballot, value)

    def _was_accepted(self, sender: int, answer: Answer) -> None:
        if self._count(sender, answer):
            self.phase = Phase.DONE

    def _count(self, sender: int, answer: Answer) -> list[Answer]:
        """The votes that count, once they are a majority."""
        self._votes[sender] = answer
        counted = consistent(self._votes.values())
        if len(counted) >= majority(self._size):
            return counted
        if len(self._votes.keys() | self._lost) == self._size:
            self.phase = Phase.STRANDED
        return []

    def _refused(self, sender: int, answer: Answer) -> None:
        assert isinstance(answer.body, Refused)
        self.phase, self.outbid_by = Phase.OUTBID, answer.body.promised

    def _ignore(self, sender: int, answer: Answer) -> None:
        return None


_ANSWERS: dict[tuple[Phase, type], Callable[..., Accept | None]] = {
    (Phase.PREPARING, Promise): Round._promised,
    (Phase.PREPARING, Refused): Round._refused,
    (Phase.PROPOSING, Promise): Round._ignore,  # beyond the majority
    (Phase.PROPOSING, Accepted): Round._was_accepted,
    (Phase.PROPOSING, Refused): Round._refused,
    **{
        (over, body): Round._ignore
        for over in (Phase.DONE, Phase.OUTBID, Phase.STRANDED)
        for body in (Promise, Accepted, Refused)
    },
}


def are_chosen(size: int, mine: Sequence[Ballot], answers: Iterable[Answer]) -> list[bool]:
    """For each register whether what one voter last accepted, `mine`, is what a majority has accepted: the newest there is.

    `answers` are all that came to one Look, the voter's own among them. Where this says no, a round with `Get` finds out.
    """
    votes = [answer.body.ballots for answer in consistent(answers) if isinstance(answer.body, Seen)]
    return [sum(ballots[at] == ballot for ballots in votes) >= majority(size) for at, ballot in enumerate(mine)]
