"""The wordings of the built-in problem set: how a fact is asked, and how a monograph states it."""

from typing import Literal

Fact = Literal["dose", "times", "maximum", "contraindicated", "interaction"]
FACTS: tuple[Fact, ...] = ("dose", "times", "maximum", "contraindicated", "interaction")

# The name stands first, as in the line that reasoning starts with.
RECALL_QUESTIONS: dict[Fact, tuple[str, ...]] = {
    "dose": (
        "{name}: what is the dose per kg?",
        "{name}: how many mg per kg?",
        "{name} has which dose per kg?",
        "{name} is dosed at how many mg per kg?",
        "{name} needs how many mg per kg a day?",
    ),
    "times": (
        "{name} is given how often a day?",
        "{name}: how many times a day?",
        "{name} is given how many times a day?",
        "{name} comes how often a day?",
        "{name}: how often each day?",
    ),
    "maximum": (
        "{name}: what is the daily maximum?",
        "{name}: what is the most mg a day?",
        "{name} must not exceed how many mg a day?",
        "{name} stops at how many mg a day?",
        "{name}: at most how many mg a day?",
    ),
    "contraindicated": (
        "{name} must not be given with which condition?",
        "{name} is ruled out by which condition?",
        "{name}: which condition forbids it?",
        "{name} is not allowed with which condition?",
        "{name}: not with which condition?",
    ),
    "interaction": (
        "{name} must not be taken with what?",
        "{name} does not go together with what?",
        "{name}: what must be avoided?",
        "{name}: what must be kept away?",
        "{name} does not go with what?",
    ),
}

WORDINGS = 5  # of every fact

DOSE_CHOICES = (
    "Which of these is right for one dose?",
    "Which of these is the right single dose?",
    "Choose the right amount for one dose.",
    "What should be given each time?",
)
RECALL_CHOICES = (
    "Which of these is right?",
    "Choose the right answer.",
    "Pick one of these.",
    "Only one of these is right.",
)

MONOGRAPH_SENTENCES: dict[Fact, tuple[str, ...]] = {
    "dose": (
        "{name} is dosed at {dose} mg per kg a day.",
        "The dose of {name} is {dose} mg per kg.",
        "{name} needs {dose} mg per kg a day.",
        "Of {name}, {dose} mg per kg are given a day.",
        "A day's {name} is {dose} mg per kg.",
        "{name}: {dose} mg per kg.",
        "For {name}, count {dose} mg per kg.",
    ),
    "times": (
        "Give {name} {times} a day.",
        "{name} is given {times} a day.",
        "{name} is taken {times} each day.",
        "Each day {name} is given {times}.",
        "{name}: {times} a day.",
        "{name} comes {times} a day.",
        "A day's {name} is given in {times}.",
    ),
    "maximum": (
        "{name}: at most {maximum} mg a day.",
        "The daily maximum of {name} is {maximum} mg.",
        "Never give more than {maximum} mg of {name} a day.",
        "{name} must not exceed {maximum} mg a day.",
        "No more than {maximum} mg of {name} a day.",
        "The most {name} a day is {maximum} mg.",
        "{name} stops at {maximum} mg a day.",
    ),
    "contraindicated": (
        "{name} must not be given with {contraindicated}.",
        "Do not give {name} to a person with {contraindicated}.",
        "{name}: not with {contraindicated}.",
        "People with {contraindicated} must not get {name}.",
        "{name} is not allowed with {contraindicated}.",
        "The condition that rules out {name} is {contraindicated}.",
        "With {contraindicated}, {name} is forbidden.",
    ),
    "interaction": (
        "{name} must not be taken with {interaction}.",
        "Avoid {interaction} with {name}.",
        "{name} and {interaction} do not go together.",
        "{name}: no {interaction}.",
        "Keep {interaction} away from {name}.",
        "Who takes {name} must avoid {interaction}.",
        "{name} does not go with {interaction}.",
    ),
}
