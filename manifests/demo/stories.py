"""Makes up the sentences that the demo model learns from: a small probabilistic grammar, written as tables.

A story is a list of beats; each beat offers several sentences, of which one is drawn. The slots in braces are
filled from one draw of friends, things and places, so a story keeps its names and pronouns to the end.
Everything here was written for this project; no other text goes into the model.

Does not tokenise and does not train (`train.py`). The same random generator state gives the same text.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

USER = "<|user|>"
ASSISTANT = "<|assistant|>"


@dataclass(frozen=True, slots=True)
class Friend:
    name: str
    kind: str
    pronoun: str
    """Subject form: he, she or it."""
    home: str
    likes: str


FRIENDS = (
    Friend("Milo", "mouse", "he", "in the attic", "warm bread"),
    Friend("Luna", "cat", "she", "in the kitchen", "soft blankets"),
    Friend("Otto", "owl", "he", "on the roof", "old maps"),
    Friend("Fern", "fox", "she", "behind the garden", "long walks"),
    Friend("Bruno", "bear", "he", "in the cellar", "sweet honey"),
    Friend("Pip", "rabbit", "she", "in the barn", "fresh carrots"),
    Friend("Rosa", "gardener", "she", "near the gate", "yellow flowers"),
    Friend("Ben", "baker", "he", "above the bakery", "apple cake"),
    Friend("Clara", "teacher", "she", "in the library", "good questions"),
    Friend("Sam", "sailor", "he", "by the harbor", "windy days"),
    Friend("Bolt", "robot", "it", "in the workshop", "clean oil"),
    Friend("Tock", "clock", "it", "in the hall", "quiet evenings"),
)
OBJECT_FORM = {"he": "him", "she": "her", "it": "it"}
POSSESSIVE = {"he": "his", "she": "her", "it": "its"}

THINGS = (
    "ball",
    "kite",
    "key",
    "lantern",
    "bell",
    "blanket",
    "book",
    "boat",
    "letter",
    "hat",
    "basket",
    "map",
)
COLORS = ("red", "blue", "green", "yellow", "silver", "little", "brown", "wooden")
PLACES = (
    "under the table", "behind the door", "in the attic", "on the roof", "near the river", "in the garden",
    "under the big tree", "in the kitchen", "by the harbor", "in the workshop", "behind the barn",
    "on the bridge", "in the cellar", "in the library",
)  # fmt: skip
TIMES = ("morning", "evening", "afternoon", "night", "day")
WEATHER = ("cold", "rainy", "sunny", "windy", "quiet", "snowy", "warm")
FOODS = ("soup", "bread", "apple cake", "honey cake", "pancakes", "carrot soup")
SKILLS = ("sing", "dance", "swim", "read", "paint", "cook", "whistle", "count to ten")
WORKS = ("a bridge", "a boat", "a tower", "a tree house", "a little windmill", "a kite", "a radio")
FEELINGS = ("happy", "proud", "glad", "very happy")

OPENINGS = (
    "One {weather} {time}, {A}",
    "On a {weather} {time}, {A}",
    "Once upon a time, {A}",
)
CLOSINGS = (
    "From that day on, {a} and {b} were best friends.",
    "Everyone in the house was {feeling}.",
    "That night, they all slept very well.",
    '"Sharing makes everything lighter," said {b}, and everyone laughed.',
    "{a} was {feeling}, and so was {b}.",
    "And {a} never forgot what {his} friends had done.",
    "They were tired, but they were {feeling}.",
    "It was the best {time} of the year.",
)

LOST = (
    (
        " lost {his} {color} {thing}.",
        " could not find {his} {color} {thing}.",
        " was looking for a {color} {thing}.",
    ),
    (
        "{He} looked {place1}, but the {thing} was not there.",
        "First, {he} looked {place1}, but there was only dust.",
    ),
    (
        "Then {he} looked {place2}, but it was not there either.",
        "Then {he} looked {place2}, and found nothing.",
    ),
    ("{a} was sad and sat down.", "{a} did not know what to do.", "{a} began to worry."),
    (
        'Then {B} came by. "What are you looking for?" asked {b}.',
        '{B} saw {him} and asked, "Can I help you?"',
        '"Let us look together," said {B}.',
    ),
    (
        '"My {thing} is gone," said {a}.',
        '"I have lost my {thing}," {a} answered.',
        '"I want my {thing} back," said {a}.',
    ),
    (
        '"I saw a {color} {thing} {place3}," said {b}.',
        '{b} smiled. "There is a {color} {thing} {place3}," {he2} said.',
        '{b} thought for a while. "Look {place3}," {he2} said.',
    ),
    (
        "They went there together, and there was the {thing}.",
        "So {a} looked {place3}, and there was the {color} {thing}.",
        "They ran all the way, and {a} found the {thing} at last.",
    ),
    ('"Thank you, {b}," said {a}.', "{a} thanked {b} and held the {thing} tight."),
)
BOOK = (
    (
        " found a very big book {place1}.",
        " wanted to bring a great book home.",
        " had a book that was too heavy to carry.",
    ),
    (
        "It was so heavy that nobody could carry it alone.",
        "{He} pulled and pushed, but the book did not move.",
        "The book had eight chapters, and each one was heavy.",
    ),
    ('"It is too big for me," said {a}.', '"I can only carry one part," said {a}.'),
    (
        '"I can carry two chapters," said {B}.',
        '"Then I will take the first part," said {B}.',
        '{B} said, "Give me the pages you cannot carry."',
    ),
    (
        '"And I will take the rest," said {C}.',
        '{C} said, "The last part is for me."',
        "{C} took the last pages.",
    ),
    (
        "So each friend carried a part, and no one was tired.",
        "So they shared the book, and every part was light.",
    ),
    (
        "In the evening, {a} read the first part, {b} read the next part, and {c} read the end.",
        "{a} read, then {b} read, then {c} read, and the story was whole again.",
        "When they put the parts together, not one page was missing.",
    ),
)
STORM = (
    (
        " heard a loud storm outside.",
        " saw dark clouds over the house.",
        " woke up because the wind was strong.",
    ),
    (
        "All the lights went out.",
        "Then every lamp in the house went dark.",
        "The house became dark and cold.",
    ),
    ("{He} was afraid of the dark.", "{a} could not see anything.", '"Is anybody here?" asked {a}.'),
    (
        "{B} came with a {color} lantern.",
        '"I am here," said {B}, and lit a {color} lantern.',
        "Then a small light came closer. It was {B} with a lantern.",
    ),
    (
        '"Come and sit with me," said {b}.',
        '"A storm is only wind and water," said {b}.',
        '"Do not worry," {he2} said. "We are together."',
    ),
    ("{C} brought {food} for everyone.", "{C} came too, and brought a warm blanket."),
    ("They told stories until the storm was over.", "They sat close and waited for the sun."),
)
BUILD = (
    (" wanted to build {work}.", " had a plan to build {work} {place1}."),
    ("{He} worked all morning.", "{He} brought wood, rope and nails.", "{He} drew a plan on paper."),
    ("But {work} is hard to build alone, and it fell down.", "But the wind came, and everything fell down."),
    (
        '"What went wrong?" asked {B}.',
        '{B} looked at the plan. "One piece is missing," {he2} said.',
        '"You need more hands," said {B}.',
    ),
    ('"Will you help me?" asked {a}.', '"Please help me," said {a}.'),
    (
        '"Of course," said {b}. "I will hold the rope, and you will hold the wood."',
        '"Yes," said {b}, "and {c} can help us too."',
        '"Yes, I will," said {b}.',
    ),
    ("They worked together until the evening.", "{b} held the wood while {a} worked with the rope."),
    (
        "This time, it did not fall.",
        "At last it was finished, and it was strong.",
        "It was even better than before.",
    ),
)
MESSAGE = (
    (" wanted to send a message to {C}.", " wrote a letter to {C}."),
    ("But {c} lived far away, {home3}.", "But the road was long, and {c} was far away."),
    (
        '"I know {c}," said {B}. "Give me your letter, and I will pass it on."',
        '"Give it to me," said {B}. "I go that way every {time}."',
    ),
    ("So the letter went from {a} to {b}, and from {b} to {c}.", "So {b} took the letter and ran to {c}."),
    (
        "{c} checked the letter twice, to be sure that no word was changed.",
        "{c} opened the letter and read every word.",
    ),
    ('It said, "Come to my house and eat {food} with us."', 'It said, "I have found your {color} {thing}."'),
    ("{c} was {feeling} and wrote an answer at once.", '"What a good letter," said {c}.'),
    ("Now there was a little network of friends.", "Since then, letters go from house to house every day."),
)
COOK = (
    (" wanted to make {food} for {his} friends.", " was hungry and wanted {food}."),
    (
        "But there was no salt in the kitchen.",
        "But {he} had only one spoon and a pot.",
        "But the kitchen was empty.",
    ),
    ('"I have some flour," said {B}.', "{B} brought apples and milk.", '"I have butter," said {B}.'),
    ('"And I have a big pot," said {C}.', "{C} brought sugar and a big spoon."),
    (
        "They put everything into the pot and waited.",
        "{a} mixed it, {b} watched the fire, and {c} washed the plates.",
    ),
    ("Soon the whole house smelled of {food}.", "It smelled so good that all the neighbors came."),
    ("There was enough for everyone.", '"It tastes better when we share it," said {c}.'),
)
LEARN = (
    (" wanted to learn to {skill}.", " could not {skill}, and that made {him} sad."),
    ('"I am too small for that," said {a}.', '"It looks so easy when others do it," said {a}.'),
    ('"I can teach you," said {B}.', '"Watch me," said {B}. "It is not hard."'),
    ("On the first day, {a} made many mistakes.", "At first, it went very badly."),
    ('"Try again," said {b}.', '"Every mistake teaches you something," said {b}.', "But {b} was patient."),
    ("{a} tried again and again.", "{He} practiced every {time}.", "{He} tried a little longer each day."),
    ("After a week, {a} could {skill} better than anyone.", "One day, {he} could {skill}, and {b} clapped."),
)
NOISE = (
    (" heard a strange noise {place1}.", " could not sleep because of a strange noise."),
    ('"What is that?" {he} whispered.', "It went tap, tap, tap.", "It sounded like a very small drum."),
    ("{He} woke up {B}.", "{He} called {B}, and {B} came at once."),
    ("Together they walked slowly and looked {place2}.", '"Let us go and see," said {b}.'),
    ("The noise became louder.", "{a} held on to {b}.", "They stopped and listened."),
    (
        "But it was only {C}, who was looking for a {color} {thing}.",
        "There sat {C} with a {color} {thing}, and the {thing} went tap, tap, tap.",
    ),
    ('"Did I wake you?" asked {c}.', '"I am sorry," said {c}.'),
    ("They all laughed, and {a} was not afraid any more.", "{a} laughed and went back to bed."),
)
PLOTS = (LOST, BOOK, STORM, BUILD, MESSAGE, COOK, LEARN, NOISE)

WORLD = (
    ("What is a layer?", "A layer is one part of a model. Many layers together can think."),
    ("What is a block?", "A block is a small piece of a file. Its name tells you if it is right."),
    ("What is a peer?", "A peer is another machine, and it shares what it has."),
    ("What is a seed?", "A seed is a peer that has all the parts and gives them to everyone."),
    ("What is a manifest?", "A manifest is a list of all the parts, with a name at the end."),
    ("What is a CID?", "A CID is a name that is made from the bytes, so nobody can change it."),
    ("What is a network?", "A network is many friends who pass things on."),
    ("How do friends share a big book?", "Each friend carries one part, and they read it together."),
    ("What is a model?", "A model is a lot of numbers that learned from stories."),
    ("Who are you?", "I am a very small model. I can tell short stories."),
    ("What can you do?", "I can tell short stories and answer small questions."),
    ("Hello.", "Hello! I am glad that you are here."),
    ("Hello!", "Hello! I am glad that you are here."),
    ("Good morning.", "Good morning! What do you want to know?"),
    ("How are you?", "I am happy, because all my layers are here."),
    ("Thank you.", "You are welcome."),
    ("Who made you?", "A small script made me, in a few minutes."),
)

HOMEWARD = "{A} lived {home} and liked {likes}. One {weather} {time}, {he}"
STORY_REQUESTS = (
    "Tell me a story",
    "Please tell me a story",
    "Can you tell me a story",
    "I want to hear a story",
)
FACTS = (
    ("Who is {a}?", "{a} is {one}. {He} lives {home} and likes {likes}."),
    ("Where does {a} live?", "{a} lives {home}."),
    ("What does {a} like?", "{a} likes {likes}."),
    ("Who lives {home}?", "{A} lives {home}."),
    ("Who likes {likes}?", "{A} likes {likes}."),
)
Turn = tuple[str, str]
"""Question and answer."""
T = TypeVar("T")
HABIT = (8, 4, 2, 1)
"""How much likelier the favourite of a list is, and those that follow it."""


def leaning(rng: random.Random, options: Sequence[T], favourite: int = 0) -> T:
    """One option, oftenest the favourite: without habits, half of what the model says would be a tie."""
    count = len(options)
    weights = [HABIT[min((place - favourite) % count, len(HABIT) - 1)] for place in range(count)]
    return rng.choices(options, weights)[0]


def draw_slots(rng: random.Random, hero: Friend) -> dict[str, str]:
    """One draw of everything that a story talks about; a, b and c are three different friends."""
    habit = FRIENDS.index(hero)
    second = leaning(rng, [friend for friend in FRIENDS if friend is not hero], habit + 4)
    third = leaning(rng, [friend for friend in FRIENDS if friend not in (hero, second)], habit + 7)
    slots: dict[str, str] = {}
    for number in (1, 2, 3):
        free = [place for place in PLACES if place not in slots.values()]
        slots[f"place{number}"] = leaning(rng, free, habit + number)
    for letter, mark, friend in (("a", "", hero), ("b", "2", second), ("c", "3", third)):
        slots[letter] = friend.name
        slots[letter.upper()] = f"{friend.name} the {friend.kind}"
        slots["he" + mark] = friend.pronoun
        slots["He" + mark] = friend.pronoun.capitalize()
        slots["him" + mark] = OBJECT_FORM[friend.pronoun]
        slots["his" + mark] = POSSESSIVE[friend.pronoun]
    article = "an" if hero.kind[0] in "aeiou" else "a"
    slots |= {"one": f"{article} {hero.kind}", "home": hero.home, "home3": third.home, "likes": hero.likes}
    drawn = {"thing": THINGS, "color": COLORS, "time": TIMES, "weather": WEATHER, "food": FOODS}
    drawn |= {"skill": SKILLS, "work": WORKS, "feeling": FEELINGS}
    return slots | {slot: leaning(rng, words, habit) for slot, words in drawn.items()}


def story(rng: random.Random, hero: Friend | None = None) -> str:
    hero = hero or rng.choice(FRIENDS)
    habit = FRIENDS.index(hero)
    opening = leaning(rng, (*OPENINGS, HOMEWARD), habit)
    first, *rest = leaning(rng, PLOTS, habit)
    sentences = [opening + leaning(rng, first), *(leaning(rng, beat) for beat in rest)]
    return " ".join([*sentences, leaning(rng, CLOSINGS, habit)]).format_map(draw_slots(rng, hero))


def _fact(rng: random.Random) -> list[Turn]:
    slots = draw_slots(rng, rng.choice(FRIENDS))
    question, answer = rng.choice(FACTS)
    return [(question.format_map(slots), answer.format_map(slots))]


def where(rng: random.Random) -> list[Turn]:
    """Questions whose answers stand only in what was just told."""
    count = rng.choice((1, 2, 3))
    pairs = zip(rng.sample(COLORS, count), rng.sample(THINGS, count), rng.sample(PLACES, count), strict=True)
    things = [(f"{color} {thing}", place) for color, thing, place in pairs]
    told = " ".join(f"The {thing} is {place}." for thing, place in things)
    asked = rng.sample(things, rng.randint(1, count))
    turns = [(f"Where is the {thing}?", f"The {thing} is {place}.") for thing, place in asked]
    return [(f"{told} {turns[0][0]}", turns[0][1]), *turns[1:]]


def _small_talk(rng: random.Random) -> list[Turn]:
    return [rng.choice(WORLD)]


def _request(rng: random.Random) -> list[Turn]:
    mark = rng.choice((".", "!"))
    if rng.random() < 0.3:
        return [(rng.choice(STORY_REQUESTS) + mark, story(rng, leaning(rng, FRIENDS)))]
    hero = rng.choice(FRIENDS)
    asked = rng.choice((hero.name, f"{hero.name} the {hero.kind}"))
    return [(f"{rng.choice(STORY_REQUESTS)} about {asked}{mark}", story(rng, hero))]


def dialogue(rng: random.Random) -> list[Turn]:
    """Small talk, questions about the friends and about what was just said, or the wish for a story."""
    if rng.random() < 0.2:
        return _request(rng)
    kinds = rng.choices((_fact, where, _small_talk), weights=(3, 6, 2), k=rng.choice((1, 2, 3)))
    return [turn for kind in kinds for turn in kind(rng)]


def document(rng: random.Random, end: str) -> str:
    """One training text. `end` closes a story and every answer; the chat template writes the same form."""
    if rng.random() < 0.5:
        return story(rng) + end
    return "".join(f"{USER}{asked}{ASSISTANT}{answered}{end}" for asked, answered in dialogue(rng))


def documents(seed: int, count: int, end: str) -> list[str]:
    rng = random.Random(seed)
    return [document(rng, end) for _ in range(count)]


def words(text: str) -> set[str]:
    """The words of a text, without punctuation, in lower case."""
    return {word.strip('.,!?"').lower() for word in text.split()} - {""}
