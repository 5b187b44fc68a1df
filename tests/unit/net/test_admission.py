"""Who is turned away, and who makes room: floods are their own rivals."""

from __future__ import annotations

from omnistore.net.admission import LEFT_ALONE, PENDING, Doorway, Guest, crowds, to_let_go


class Socket:
    """All that counts of one is which it is."""


def guest(name: str, host: str, since: float = 0.0, *, busy: bool = False) -> Guest[str]:
    return Guest(name, host, since, busy)


def test_there_is_room_for_as_many_as_it_says() -> None:
    door: Doorway[Socket] = Doorway(most=3)
    came = [Socket() for _ in range(3)]
    assert [door.came(one, "here") for one in came] == [None] * 3
    door.left(came[0])
    assert door.came(Socket(), "here") is None
    assert door.came(Socket(), "here") is came[1]


def test_a_flood_turns_away_its_own_oldest() -> None:
    door: Doorway[Socket] = Doorway(most=4)
    honest, flood = Socket(), [Socket() for _ in range(20)]
    assert door.came(honest, "elsewhere") is None
    turned = [door.came(one, "flood") for one in flood]
    assert turned == [None] * 3 + flood[:17]
    late = Socket()
    assert door.came(late, "a third") is flood[17]


def test_who_left_already_is_no_matter() -> None:
    door: Doorway[Socket] = Doorway(most=1)
    door.left(Socket())
    assert door.came(Socket(), "here") is None


def test_of_many_places_the_one_with_the_most_loses_its_oldest_idle_one() -> None:
    crowd = [
        guest("oldest of all", "alone", 0),
        guest("busy", "flood", 1, busy=True),
        guest("second", "flood", 3),
        guest("first", "flood", 2),
        guest("other", "pair", 1),
        guest("other too", "pair", 1),
        guest("newest", "new", 100),
    ]
    assert to_let_go(crowd, "newest", 100.0) == "first"
    assert to_let_go([one for one in crowd if one.host != "flood"], "newest", 100.0) == "other"


def test_a_flood_makes_room_for_others_at_once_and_for_itself_when_it_is_old() -> None:
    flood = [guest("a", "flood", 1), guest("b", "flood", 2)]
    assert to_let_go([*flood, guest("newest", "new", 2)], "newest", 2.0) == "a"
    more = [*flood, guest("newest", "flood", 2)]
    assert to_let_go(more, "newest", 1 + LEFT_ALONE - 0.1) == "newest"
    assert to_let_go(more, "newest", 1 + LEFT_ALONE) == "a"


def test_what_is_in_use_stays() -> None:
    crowd = [guest("busy", "flood", 0, busy=True), guest("too", "flood", 0, busy=True), guest("new", "x", 9)]
    assert to_let_go(crowd, "new", 99.0) == "new"


def test_what_a_flood_begins_with_keeps_nobody_out() -> None:
    """Identify runs on every new connection: a house full of those is not in use."""
    flood = [guest(name, "flood", 98 + n / 10, busy=True) for n, name in enumerate("abcd")]
    assert to_let_go([*flood, guest("new", "x", 99)], "new", 99.0) == "a"
    idle = guest("idle", "flood", 98.9)
    assert to_let_go([*flood, idle, guest("new", "x", 99)], "new", 99.0) == "idle"
    # Of a house that is no one's, whoever is busy stays.
    mixed = [guest(name, f"host {n // 2}", 98, busy=True) for n, name in enumerate("abcdef")]
    assert to_let_go([*mixed, guest("new", "x", 99)], "new", 99.0) == "new"
    # Nor does a flood turn out its own.
    assert to_let_go([*flood, guest("new", "flood", 99)], "new", 99.0) == "new"


def test_the_last_places_are_for_those_who_have_few() -> None:
    assert not crowds(1000, PENDING + 1)
    assert crowds(PENDING // 2, PENDING)
    assert not crowds(PENDING // 2 - 1, 0)
