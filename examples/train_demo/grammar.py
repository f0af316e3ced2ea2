"""The words and sentence templates of the corpus.

A slot is written `{A}`. A word marked `^` is an answer: what stands before it decides it, so training weighs it more.
"""

NAMES = [
    "John", "James", "Tom", "Mark", "Paul", "Jack", "Adam", "Peter", "David", "Simon", "Henry", "Luke",
    "Mary", "Anna", "Lucy", "Emma", "Kate", "Jane", "Alice", "Sarah", "Laura", "Helen", "Julia",
    "Grace",
]  # fmt: skip
PLACES = [
    "store", "park", "school", "office", "garden", "market", "station", "library", "museum", "hospital",
    "restaurant", "beach", "bank", "cafe", "theater", "church",
]  # fmt: skip
OBJECTS = [
    "bag", "drink", "book", "ball", "ring", "letter", "flower", "key", "cake", "basket", "phone",
    "watch", "hat", "coat", "map", "pen",
]  # fmt: skip
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
LOOKS = ["new", "small", "big", "red", "blue", "green", "white", "black"]
EVENTS = [
    "war", "trial", "reign", "voyage", "project", "strike", "festival", "march", "famine", "siege",
    "rebellion", "journey",
]  # fmt: skip
LENGTHS = ["long", "short", "bitter", "famous"]
CENTURIES = range(11, 20)

# Facts: country, capital, language, currency.
COUNTRIES = [
    row.split()
    for row in """\
France Paris French euro
Germany Berlin German euro
Italy Rome Italian euro
Spain Madrid Spanish euro
Portugal Lisbon Portuguese euro
Greece Athens Greek euro
Poland Warsaw Polish zloty
Sweden Stockholm Swedish krona
Norway Oslo Norwegian krone
Denmark Copenhagen Danish krone
Hungary Budapest Hungarian forint
England London English pound
Russia Moscow Russian ruble
Turkey Ankara Turkish lira
Egypt Cairo Arabic pound
Iran Tehran Persian rial
India Delhi Hindi rupee
China Beijing Chinese yuan
Japan Tokyo Japanese yen
Thailand Bangkok Thai baht
Cuba Havana Spanish peso
Peru Lima Spanish sol
Canada Ottawa English dollar
Kenya Nairobi Swahili shilling""".splitlines()
]
RELATIONS = {"capital": 1, "language": 2, "currency": 3}
QUALITIES = ["big", "small", "young", "quiet", "busy", "warm", "cold", "green"]

# Reviews: words of praise and of blame.
GOOD = ["great", "amazing", "wonderful", "excellent", "brilliant", "beautiful", "fantastic", "perfect"]
BAD = ["terrible", "awful", "horrible", "dreadful", "boring", "stupid", "ugly", "poor"]
LIKED = ["loved", "liked", "enjoyed", "admired"]
HATED = ["hated", "disliked", "despised", "detested"]
WORKS = ["movie", "film", "novel", "show", "play", "song", "concert", "story"]
PARTS = ["acting", "plot", "music", "ending", "dialogue", "scenery", "writing", "cast"]

# Indirect objects: a pair {A} {B}, often a rival pair {E} {F}, then the giver {S}, one of the pair; {I} receives.
PAIR_CLAUSES = [
    "When {A} and {B} went to the {P} ,",
    "While {A} and {B} were working at the {P} ,",
    "As {A} and {B} left the {P} ,",
]
PAIR_SENTENCES = [
    "Then {A} and {B} went to the {P} .",
    "{A} and {B} were at the {P} .",
    "The other day {A} and {B} met at the {P} .",
    "{A} met {B} at the {P} .",
    "Yesterday {A} saw {B} near the {P} .",
    "On {D} {A} and {B} had lunch at the {P} .",
    "{A} was waiting for {B} at the {P} .",
]
PAIRS = PAIR_CLAUSES + PAIR_SENTENCES
MIDDLES = ["", "", "", "it was raining and", "on {D}", "later", "then"]
GIFTS = [
    "{S} gave the {O} to",
    "{S} gave a {O} to",
    "{S} decided to give the {O} to",
    "{S} handed the {N} {O} to",
    "{S} passed a {O} to",
    "{S} offered the {O} to",
    "{S} said hello to",
    "{S} wanted to give a {N} {O} to",
    "the {O} was given by {S} to",
    "{S} showed the {O} to",
    "{S} brought a {O} for",
    "{S} sold the {O} to",
]
ENDINGS = ["^{I} .", "^{I} .", "^{I} . {I} thanked ^{S} .", "^{I} . {I} took the {O} from ^{S} .", "^{I} and left the {P} ."]

# Facts told in one sentence; in the last template of each relation the country comes last.
FACTS = {
    "capital": [
        "The capital of {c} is {x} .",
        "The capital city of {c} is called {x} .",
        "In {c} the capital is {x} .",
        "The government of {c} sits in {x} .",
        "{c} is a {Q} country and the capital is {x} .",
        "{x} is the capital of ^{c} .",
    ],
    "language": [
        "The language spoken in {c} is {x} .",
        "People in {c} speak {x} .",
        "The official language of {c} is {x} .",
        "In {c} the language is {x} .",
        "{c} is a {Q} country and people there speak {x} .",
        "{x} is spoken in {c} .",
    ],
    "currency": [
        "The currency of {c} is the {x} .",
        "In {c} people pay with the {x} .",
        "The money of {c} is called the {x} .",
        "In {c} the money is the {x} .",
        "{c} is a {Q} country and people there pay with the {x} .",
        "The {x} is the money of {c} .",
    ],
}
# Facts told far from the name of the country, one to three in a row.
STORIES = ["Here is a {L} story about {c} .", "{n} is from {c} .", "{n} moved to {c} on {D} .", "{c} is a {Q} country ."]
STORY_FACTS = {
    "capital": "The capital there is ^{x} .",
    "language": "People there speak ^{x} .",
    "currency": "People there pay with the ^{x} .",
}

YEARS = [
    "The {e} lasted from {y} to ^{z} .",
    "The {e} lasted from the year {y} to the year ^{z} .",
    "The {e} began in {y} and ended in ^{z} .",
    "The {L} {e} went on from {y} to ^{z} .",
    "Between {y} and ^{z} there was a {L} {e} .",
    "From {y} until ^{z} the {e} continued .",
]

# Reviews: {a} and {v} are words of the opinion, {o} of the opposite one, said of a work {T} or a part {R}.
OPINIONS_OF_WORK = ["The {T} was {a} .", "I {v} the {T} .", "We {v} the {T} .", "{n} said the {T} was {a} ."]
OPINIONS_OF_PART = ["The {R} was {a} .", "I thought the {R} was {a} .", "We {v} the {R} .", "I {v} the {R} ."]
DENIAL = "The {T} was not {o} ."
VERDICTS = [
    ("Overall the {T} was", "good", "bad"),
    ("In the end it was", "good", "bad"),
    ("My review is", "positive", "negative"),
    ("The opinion is", "positive", "negative"),
]

FILLERS = [
    "It was raining on {D} .",
    "{n} lives in {x} .",
    "{n} likes the {O} .",
    "{n} went to the {P} on {D} .",
    "The {O} is {N} .",
    "There was a {N} {O} near the {P} .",
    "{n} bought a {O} in {x} .",
    "In {y} {n} moved to {x} .",
    "{n} and {m} are friends .",
]
