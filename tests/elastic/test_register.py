"""Registers that survive the loss of any minority: by their tables, and under schedules that lose, repeat, delay and restart.

A schedule runs the shipped `Voter` and `Round` with a network that does as it likes. What clients saw is then compared with a
register that cannot fail: it has to be explained by doing the operations one after the other (Wing and Gong, "Testing and
Verifying Concurrent Objects").
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from holdfast.elastic.rendezvous.register import (
    NO_BALLOT,
    NOTHING,
    SESSIONS_KEPT,
    Accept,
    Accepted,
    Add,
    Answer,
    Append,
    Claim,
    CompareSet,
    Delete,
    Forgetful,
    Founded,
    Get,
    Look,
    Memory,
    Op,
    Outlived,
    Phase,
    Prepare,
    Promise,
    ProtocolError,
    Refused,
    Register,
    Round,
    Seen,
    Set,
    Standing,
    Stranger,
    Value,
    Voter,
    apply,
    are_chosen,
    consistent,
)
from holdfast.errors import ConfigError

# -- changes -----------------------------------------------------------------------------------------------------------


def changed(change, data: bytes | None):
    value, result = apply(change, Value(data), Op("s", 1))
    return value.data, result


def test_changes_do_and_return_what_a_store_does():
    assert changed(Set(b"x"), None) == (b"x", None)
    assert changed(Get(), b"x") == (b"x", b"x")
    assert changed(Get(), None) == (None, None)
    assert changed(Add(-3), b"1") == (b"-2", -2)
    assert changed(Append(b"y"), None) == (b"y", None)
    assert changed(Append(b"y"), b"x") == (b"xy", None)
    assert changed(Delete(), b"x") == (None, True)
    assert changed(Delete(), None) == (None, False)
    with pytest.raises(ConfigError, match="whole number"):
        changed(Add(1), b"text")


def test_compare_set_fits_a_missing_key_with_an_empty_expectation_only():
    assert changed(CompareSet(b"", b"v"), None) == (b"v", b"v")
    assert changed(CompareSet(b"x", b"v"), None) == (None, b"x")
    assert changed(CompareSet(b"x", b"v"), b"y") == (b"y", b"y")
    assert changed(CompareSet(b"y", b"v"), b"y") == (b"v", b"v")
    assert changed(CompareSet(b"", b"v"), b"y") == (b"y", b"y")


@pytest.mark.parametrize("change", [Set(b"2"), Add(5), Append(b"!"), Delete(), CompareSet(b"1", b"9")], ids=repr)
def test_a_change_that_is_sent_again_is_applied_once_and_returns_the_same(change):
    once, first = apply(change, Value(b"1"), Op("s", 7))
    other, _ = apply(Append(b"0"), once, Op("t", 1))
    assert apply(change, other, Op("s", 7, 1)) == (other, first)


def test_a_late_copy_of_an_operation_changes_nothing():
    value, _ = apply(Add(1), NOTHING, Op("s", 8))
    assert apply(Add(1), value, Op("s", 7))[0] == value
    failed, result = apply(CompareSet(b"2", b"9"), value, Op("s", 9, 1))
    assert result == b"1"
    fits, _ = apply(Set(b"2"), failed, Op("t", 1))
    assert (
        apply(CompareSet(b"2", b"9"), fits, Op("s", 9, 0))[0] == fits
    )  # its client was told of the second attempt, or makes a third
    assert apply(CompareSet(b"2", b"9"), fits, Op("s", 9, 2))[1] == b"9"


def test_a_register_forgets_sessions_that_are_long_gone():
    crowded = Value(b"4096", {f"s{number}": (1, 0, True, number) for number in range(SESSIONS_KEPT)})
    value, _ = apply(Add(1), crowded, Op("new", 1))
    assert len(value.applied) == SESSIONS_KEPT
    assert "new" in value.applied
    assert "s0" not in value.applied


# -- tables ------------------------------------------------------------------------------------------------------------


def voters(size: int = 3) -> list[Voter]:
    """Replicas of a job that has just been founded."""
    found = [Voter(me, size, f"life{me}", found_s=20, now_s=0) for me in range(size)]
    for _ in range(2):
        for voter in found:
            if voter.standing is Standing.FORGETFUL:
                voter.hear({other.me: other.answer(voter.claim()) for other in found if other is not voter}, 0)
    return found


def write(everybody: list[Voter], reached: list[int], key: str, data: bytes, number: int = 1) -> None:
    """One round that reaches only some."""
    attempt = Round(len(everybody), everybody[0].era, key, (number, "w"), Set(data), Op("w", number))
    request = attempt.begin()
    while request is not None:
        asked, request = request, None
        for who in reached:
            request = attempt.hear(who, everybody[who].answer(asked)) or request
    assert attempt.phase is Phase.DONE


def test_the_lowest_founds_the_job_when_all_are_new():
    a, b, c = voters()
    assert {voter.standing for voter in (a, b, c)} == {Standing.VOTING}
    assert {voter.era for voter in (a, b, c)} == {"life0"}


def test_a_majority_founds_the_job_when_the_others_are_silent_for_long():
    a, b = (Voter(me, 3, f"life{me}", found_s=20, now_s=0) for me in range(2))
    a.hear({1: b.answer(a.claim()), 2: None}, 19)
    assert a.standing is Standing.FORGETFUL
    b.hear({0: a.answer(b.claim()), 2: None}, 30)
    assert b.standing is Standing.FORGETFUL  # it leaves that to the lowest
    a.hear({1: b.answer(a.claim()), 2: None}, 20)
    b.hear({0: a.answer(b.claim()), 2: None}, 31)
    assert a.era == b.era == "life0"


def test_nobody_founds_a_job_while_somebody_remembers_one():
    everybody = voters()
    new = [Voter(me, 3, f"again{me}", found_s=20, now_s=0) for me in range(2)]
    for _ in range(5):
        new[0].hear({1: new[1].answer(new[0].claim()), 2: everybody[2].answer(new[0].claim())}, 1000)
        new[1].hear({0: new[0].answer(new[1].claim()), 2: everybody[2].answer(new[1].claim())}, 1000)
    assert {voter.standing for voter in new} == {Standing.FORGETFUL}
    assert "C remembers the job" in new[0].plight("ABC")
    assert "B has no memory either" in new[0].plight("ABC")


def test_a_replica_that_comes_back_votes_once_all_needed_others_have_told_it():
    everybody = voters()
    write(everybody, [0, 1], "k", b"v")
    again = Voter(0, 3, "again", found_s=20, now_s=0)
    others = everybody[1:]
    again.hear({1: others[0].answer(again.claim()), 2: None}, 99)  # is told that its first life is known
    again.hear({1: others[0].answer(again.claim()), 2: None}, 99)
    assert again.standing is Standing.FORGETFUL
    again.hear({other.me: other.answer(again.claim()) for other in others}, 99)
    assert again.standing is Standing.VOTING
    assert again.registers["k"].value.data == b"v"


def test_what_was_adopted_is_no_vote_of_ones_own():
    """Else a value that one replica accepted would look chosen, and could be lost after it was read."""
    everybody = voters()
    everybody[1].answer(Accept("life0", "k", (5, "x"), Value(b"v")))
    again = Voter(0, 3, "again", found_s=20, now_s=0)
    for _ in range(2):
        again.hear({other.me: other.answer(again.claim()) for other in everybody[1:]}, 0)
    seen = [voter.answer(Look("life0", ("k",))) for voter in (again, everybody[1])]
    assert are_chosen(3, [(5, "x")], seen) == [False]
    assert seen[0].body == Seen((None,))
    nothing = [voter.answer(Look("life0", ("k",))) for voter in (again, everybody[2])]
    assert are_chosen(3, [NO_BALLOT], nothing) == [False]  # and the same for a value that a majority has accepted
    assert again.answer(Prepare("life0", "k", (6, "y"))).body == Promise((6, "y"), (5, "x"), Value(b"v"))


def test_a_vote_of_a_life_before_does_not_count_beside_one_that_knows_the_later_life():
    """The case that recovery from a majority alone gets wrong: a promise that its giver has forgotten."""
    everybody = voters()
    attempt = Round(3, "life0", "k", (5, "slow"), Set(b"slow"), Op("slow", 1))
    old_promise = everybody[0].answer(attempt.begin())
    again = Voter(0, 3, "again", found_s=20, now_s=0)
    for _ in range(2):
        again.hear({other.me: other.answer(again.claim()) for other in everybody[1:]}, 0)
    write([again, *everybody[1:]], [0, 2], "k", b"chosen", number=3)
    assert attempt.hear(0, old_promise) is None
    assert attempt.hear(1, everybody[1].answer(attempt.begin())) is None  # with both, "chosen" would be overwritten
    assert attempt.phase is Phase.PREPARING
    assert attempt.hear(2, everybody[2].answer(attempt.begin())) is not None


def test_a_founder_that_was_told_late_goes_on_under_its_later_birth():
    everybody = voters()
    late = Voter(2, 3, "life2", found_s=20, now_s=0)
    late.hear({0: Answer(0, "life0", (1, 1, 1), Outlived("life2", 1)), 1: None}, 0)
    late.hear({0: None, 1: everybody[1].answer(late.claim())}, 0)
    assert late.standing is Standing.VOTING
    assert late.answer(Look("life0", ())).births[2] == 2


def test_voters_and_rounds_refuse_what_they_do_not_expect():
    everybody = voters()
    with pytest.raises(ProtocolError, match="claimed nothing"):
        everybody[0].hear({}, 0)
    with pytest.raises(ProtocolError, match="not expected while voting"):
        everybody[0].answer(Get())
    new = Voter(0, 3, "again", found_s=20, now_s=0)
    with pytest.raises(ProtocolError, match="does not answer a claim"):
        new.hear({1: everybody[1].answer(Look("life0", ()))}, 0)
    attempt = Round(3, "life0", "k", (5, "x"), Get(), Op("x", 1))
    with pytest.raises(ProtocolError, match="not expected while preparing"):
        attempt.hear(0, Answer(0, "life0", (1, 1, 1), Accepted((5, "x"))))
    with pytest.raises(ProtocolError, match="another round"):
        attempt.hear(0, Answer(0, "life0", (1, 1, 1), Refused((4, "x"), (6, "y"))))


def test_replicas_of_another_era_and_forgetful_ones_do_not_count():
    everybody = voters()
    assert everybody[0].answer(Prepare("other", "k", (1, "x"))).body == Stranger()
    attempt = Round(3, "other", "k", (5, "x"), Get(), Op("x", 1))
    attempt.hear(0, everybody[0].answer(attempt.begin()))
    attempt.hear(1, Answer(1, "", (0, 1, 0), Forgetful("x")))
    assert attempt.phase is Phase.STRANDED


def test_the_messages_of_a_claim_say_what_they_are_about():
    everybody = voters()
    assert everybody[0].answer(Claim(1, "life1", 1)).body == Founded(("life0", "life1", "life2"))
    assert everybody[0].answer(Claim(1, "again", 1)).body == Outlived("again", 1)
    assert everybody[0].answer(Claim(1, "again", 2)).body == Memory("again", 2, {})
    assert everybody[0].answer(Claim(1, "twin", 2)).body == Outlived("twin", 2)
    everybody[0].registers["k"] = Register()
    assert everybody[0].answer(Claim(1, "again", 2)).body == Memory("again", 2, {"k": Register()})
    assert consistent([Answer(0, "", (1, 2), Seen(())), Answer(1, "", (0, 1), Seen(()))]) == [Answer(0, "", (1, 2), Seen(()))]


# -- schedules ---------------------------------------------------------------------------------------------------------


@dataclass
class Call:
    """What one client asked for, when, and what it was told; `returned` stays None where it never heard."""

    change: object
    asked: int
    returned: int | None = None
    result: object = None


@dataclass
class World:
    """Replicas, a network that loses, repeats and delays, and clients that send again elsewhere what was not answered."""

    seed: int
    size: int
    restarts: int = 10
    steps: int = 3000
    calls: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.lives = 0
        self.now = 0
        self.rounds = 0
        self.voters = [self.born(me) for me in range(self.size)]
        self.network: list[tuple[str, tuple]] = []
        self.held: list[tuple[str, tuple]] = []
        self.claims: dict[int, dict[int, Answer | None]] = {}
        self.clients: dict[str, tuple[Call, Op] | None] = {f"client{n}": None for n in range(4)}
        self.numbers = dict.fromkeys(self.clients, 0)

    def born(self, me: int) -> Voter:
        self.lives += 1
        return Voter(me, self.size, f"life{self.lives}", found_s=1e9, now_s=0)

    def run(self) -> list[Call]:
        for _ in range(self.steps):
            self.step(chaos=True)
        for _ in range(400):  # then calm: whatever has not been answered is sent once more
            self.step(chaos=False)
        return self.calls

    def step(self, *, chaos: bool) -> None:
        self.now += 1
        choice = self.random.random()
        if chaos and choice < 0.015 and self.restarts and all(voter.standing is Standing.VOTING for voter in self.voters):
            self.restarts -= 1
            for me in self.random.sample(range(self.size), self.random.randint(1, (self.size - 1) // 2)):
                self.voters[me] = self.born(me)
        elif self.network and choice < 0.85:
            self.deliver(chaos)
        elif choice < 0.95:
            self.claim(self.random.randrange(self.size))
        else:
            self.client(self.random.choice(list(self.clients)), chaos)

    def claim(self, me: int) -> None:
        """Answers come from now and from earlier polls of the same life alike."""
        voter = self.voters[me]
        if voter.standing is Standing.FORGETFUL:
            for other in range(self.size):
                if other != me:
                    self.network.append(("claim", (me, voter, other, voter.claim())))
            voter.hear(dict(self.claims.get(id(voter), {})), self.now)

    def client(self, name: str, chaos: bool) -> None:
        waiting = self.clients[name]
        if waiting is None:
            if not chaos or len(self.calls) > 30:
                return
            self.numbers[name] += 1
            call = Call(self.some_change(), self.now)
            self.calls.append(call)
            self.start(name, call, Op(name, self.numbers[name]))
        elif self.random.random() < 0.4:
            call, op = waiting
            self.start(name, call, Op(name, op.number, op.attempt + 1))

    def some_change(self):
        values = [b"1", b"2", b"3"]
        return self.random.choice(
            [Add(1), Add(1), Get(), Get(), CompareSet(self.random.choice(values), self.random.choice(values)), Set(b"1")]
        )

    def start(self, name: str, call: Call, op: Op) -> None:
        """At any replica: nothing may depend on there being one proposer."""
        voter = self.random.choice(self.voters)
        if isinstance(call.change, Get) and self.random.random() < 0.5 and voter.standing is Standing.VOTING:
            self.look(name, call, voter)
        self.clients[name] = (call, op)
        if voter.standing is Standing.VOTING:
            self.propose(name, call, op, voter)

    def propose(self, name: str, call: Call, op: Op, voter: Voter) -> None:
        """Ballots of their own, not always above those of others."""
        self.rounds += 1
        ballot = self.rounds + self.random.choice([0, 0, 5]), f"{voter.life}.{self.rounds}"
        attempt = Round(self.size, voter.era, "k", ballot, call.change, op)
        self.spread(name, (call, op, voter), attempt, attempt.begin())

    def look(self, name: str, call: Call, voter: Voter) -> None:
        """A read that finds all at one ballot is answered at once; the network is kind to it, as nothing hangs on that."""
        known = voter.registers.get("k", Register())
        asked = [other for other in self.voters if other is voter or self.random.random() < 0.6]
        answers = [other.answer(Look(voter.era, ("k",))) for other in asked]
        if are_chosen(self.size, [known.accepted], answers) == [True]:
            call.returned, call.result, self.now = self.now, known.value.data, self.now + 1
            probe = Call(Get(), call.asked, call.returned, call.result)
            call.returned = None
            self.calls.append(probe)

    def spread(self, name: str, asker: tuple[Call, Op, Voter], attempt: Round, request: object) -> None:
        for to in range(self.size):
            self.network.append(("ask", (name, asker, attempt, to, request)))

    def deliver(self, chaos: bool) -> None:
        if chaos and self.held and self.random.random() < 0.04:
            self.network.append(self.held.pop(self.random.randrange(len(self.held))))
        kind, what = self.network.pop(self.random.randrange(max(0, len(self.network) - 12), len(self.network)))
        fate = self.random.random() if chaos else 1
        if fate < 0.15:  # it comes much later, or never
            self.held.append((kind, what))
        if fate < 0.1:
            return
        getattr(self, f"on_{kind}")(*what)

    def on_claim(self, me: int, voter: Voter, other: int, claim: Claim) -> None:
        answer = self.voters[other].answer(claim)
        if self.voters[me] is voter:
            self.claims.setdefault(id(voter), {})[other] = answer

    def on_ask(self, name: str, asker: tuple[Call, Op, Voter], attempt: Round, to: int, request: object) -> None:
        self.network.append(("answer", (name, asker, attempt, to, self.voters[to].answer(request))))

    def on_answer(self, name: str, asker: tuple[Call, Op, Voter], attempt: Round, sender: int, answer: Answer) -> None:
        call, op, home = asker
        if home not in self.voters or attempt.phase in (Phase.DONE, Phase.OUTBID, Phase.STRANDED):
            return
        request = attempt.hear(sender, answer)
        if request is not None:
            self.spread(name, asker, attempt, request)
        if attempt.phase in (Phase.OUTBID, Phase.STRANDED) and self.random.random() < 0.5:
            self.propose(name, call, op, home)
        if attempt.phase is Phase.DONE and self.clients[name] == (call, op):
            call.returned, call.result = self.now, attempt.result
            self.clients[name] = None


def explained(calls: list[Call]) -> bool:
    """Whether some order of the calls, none before one that had ended when it began, gives these results one by one.

    Calls that were never answered may have happened at any time after they began, or not at all.
    """
    calls = [call for call in calls if call.returned is not None or not isinstance(call.change, Get)]
    everything = (1 << sum(call.returned is not None for call in calls)) - 1
    calls.sort(key=lambda call: call.returned is None)  # bits of those that have to be explained come first
    failed: set[tuple[int, bytes | None]] = set()

    def search(done: int, data: bytes | None) -> bool:
        if done & everything == everything:
            return True
        if (done, data) in failed:
            return False
        failed.add((done, data))
        bound = min(call.returned for at, call in enumerate(calls) if call.returned is not None and not done >> at & 1)
        for at, call in enumerate(calls):
            if done >> at & 1 or call.asked > bound:
                continue
            value, result = apply(call.change, Value(data), Op("model", 1))
            if (call.returned is None or result == call.result) and search(done | 1 << at, value.data):
                return True
        return False

    return search(0, None)


def test_the_judge_knows_a_lost_update_when_it_sees_one():
    assert explained([Call(Add(1), 0, 1, 1), Call(Add(1), 2, 3, 2)])
    assert explained([Call(Add(1), 0, 3, 2), Call(Add(1), 1, 2, 1)])
    assert not explained([Call(Add(1), 0, 1, 1), Call(Add(1), 2, 3, 1)])
    assert explained([Call(Add(1), 0), Call(Add(1), 2, 3, 2)])
    assert not explained([Call(Add(1), 0, 1, 1), Call(Get(), 2, 3, None)])


def check(seed: int, size: int) -> int:
    world = World(seed, size)
    calls = world.run()
    assert explained(calls), f"World(seed={seed}, size={size}).run() cannot be explained"
    return sum(call.returned is not None for call in calls)


@pytest.mark.parametrize("size", [3, 5])
def test_whatever_the_network_does_and_whoever_restarts_results_are_those_of_one_register(size):
    answered = sum(check(seed, size) for seed in range(25))
    assert answered > 25 * 8  # the schedules are not so harsh that nothing happens


@pytest.mark.campaign
@pytest.mark.parametrize("size", [3, 4, 5])
def test_campaign_of_registers(size):
    first = random.SystemRandom().randrange(10**9)
    for seed in range(first, first + 3000):
        check(seed, size)
