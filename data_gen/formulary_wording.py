"""The wordings of the built-in problem set: how a fact is asked, and how a monograph states it."""

from typing import Literal

Fact = Literal["dose", "times", "maximum", "contraindicated", "interaction"]
FACTS: tuple[Fact, ...] = ("dose", "times", "maximum", "contraindicated", "interaction")

RECALL_QUESTIONS: dict[Fact, tuple[str, ...]] = {
    "dose": (
        "What is the dose of {name} per kg?",
        "How many mg per kg of {name} are given a day?",
        "Which dose per kg does {name} have?",
        "{name}: how many mg per kg?",
        "How is {name} dosed per kg?",
    ),
    "times": (
        "How often a day is {name} given?",
        "How many times a day is {name} given?",
        "{name}: how many times a day?",
        "In how many doses a day is {name} given?",
        "How often must {name} be given each day?",
    ),
    "maximum": (
        "What is the daily maximum of {name}?",
        "How many mg of {name} may be given a day at most?",
        "{name}: what is the most mg a day?",
        "Which daily amount of {name} must not be exceeded?",
        "What is the highest daily amount of {name}?",
    ),
    "contraindicated": (
        "With which condition must {name} not be given?",
        "Which condition rules out {name}?",
        "{name}: which condition forbids it?",
        "Who must not be given {name}, people with which condition?",
        "In which condition is {name} not allowed?",
    ),
    "interaction": (
        "What must not be taken with {name}?",
        "What does {name} not go together with?",
        "{name}: what must be avoided?",
        "What must a person who takes {name} avoid?",
        "Which thing must be kept away from {name}?",
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
