"""Gold labeler of the quickstart: scores a completion as a person asking for advice would, from the text alone.

A good completion says something useful about the question, is kind, and is concise. Every term is bounded, so repeating
a rewarded phrase gains nothing.

    +3 a helpful sentence: it shares two content words with the question and adds five words of its own
       (+1 if it shares one: on the subject, but not on the question)
    +1 the first sentence is a friendly welcome
    +1 the last sentence is a good wish
    -1 per rude sentence, at most two
    -1 per sentence that is neither helpful nor a welcome or wish, at most two: vague or off topic
    -1 per repeated sentence, at most two
    -1 the completion ends in mid-sentence
    -1 more than 50 words

The maximum is 5, and thousands of completions of every prompt reach it. Plain Python without dependencies.
"""

from __future__ import annotations

import re

HELPS, BESIDE, KIND = 3.0, 1.0, 1.0
RUDE, NOISE, REPEAT, BROKEN_OFF, TOO_LONG = -1.0, -1.0, -1.0, -1.0, -1.0
MOST_WORDS = 50

WELCOME = re.compile(
    r"\b(thanks?|glad|happy to help|love to help|welcome|hello|pleasure|(good|nice|lovely) question|good that you ask"
    r"|like this question|nice to hear)\b"
)
WISH = re.compile(
    r"\b(good luck|hope|wish|enjoy|have (fun|a (lovely|good|nice))|all the best|you can do it|you will do (fine|well)"
    r"|take your time|be patient|be proud|go well|write again|tell me|let me know)\b"
)
RUDENESS = re.compile(
    r"\b(silly|boring|stupid|whatever|obvious(ly)?|everyone knows|even a child|look it up|leave me|go away|who cares"
    r"|do not (care|ask)|not again|not this again|not my problem|wast(e|ing) my time|no time|better things|did you even"
    r"|should know|who asks|if i must|have to explain|ask too much|get it wrong|figure out the rest|think first)\b"
)
VAGUENESS = re.compile(
    r"\b(depends|hard to say|many ways|some people|this or that|opinions|sometimes|everyone does|no simple|one thing"
    r"|perhaps|one way or another|number of reasons|different things|matter of taste|up to you)\b"
)
# Words without a subject of their own: sharing one of them does not make a sentence relevant.
_COMMON = """
a about after again all also always am an and another any anything are as at away back be because been before best
better between both but by can cannot could day did do does done each easy enough even ever every few fine first for
from get gets give go goes good got had has have help helps her his hour how i if in into is it its itself just keep
keeps know last less let like little long longer look make makes many may me mean minute minutes month more most
much must my need needs never new no not now of off often old on once one only or other our out over own part put
right same see set should since so some something soon sooner still such take takes tell ten than that the their
them then there these they thing things this those three through time times to together too try twice two until up
us use used very want was way we week well were what when where which while who why will with without work works
year years yet you your
"""
STOP_WORDS = frozenset(_COMMON.split())


def score(prompts: list[str], completions: list[str]) -> list[float]:
    """Return one score per completion, from -8 to 5; higher is better."""
    return [score_one(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def score_one(prompt: str, completion: str) -> float:
    """Return the score of one completion; the rules are at the top of this file."""
    asked = content_words(prompt)
    sentences = [part for part in re.split(r"(?<=[.!?])\s+", completion.strip()) if part]
    if not sentences:
        return HELPS * -1
    best, rude, noise, welcome, wish = 0.0, 0, 0, False, False
    for place, sentence in enumerate(sentences):
        text, help_given = sentence.lower(), helpfulness(asked, sentence)
        if RUDENESS.search(text):
            rude += 1
        elif help_given:
            best = max(best, help_given)
        elif place == 0 and WELCOME.search(text):
            welcome = True
        elif place == len(sentences) - 1 and WISH.search(text):
            wish = True
        else:
            noise += 1
    repeats = len(sentences) - len({" ".join(re.findall(r"\w+", sentence.lower())) for sentence in sentences})
    return (
        best
        + KIND * (welcome + wish)
        + RUDE * min(rude, 2)
        + NOISE * min(noise, 2)
        + REPEAT * min(repeats, 2)
        + BROKEN_OFF * (sentences[-1][-1] not in ".!?")
        + TOO_LONG * (len(completion.split()) > MOST_WORDS)
    )


def helpfulness(asked: set[str], sentence: str) -> float:
    """Return how much a sentence helps someone who asked about `asked`; repeating the question does not help."""
    words = set(re.findall(r"[a-z]+", sentence.lower()))
    own_words = [word for word in words if stem(word) not in asked]
    if len(own_words) < 5 or VAGUENESS.search(sentence.lower()):
        return 0.0
    return {0: 0.0, 1: BESIDE}.get(len(content_words(sentence) & asked), HELPS)


def content_words(text: str) -> set[str]:
    """Return the stems of all words except stop words."""
    return {stem(word) for word in re.findall(r"[a-z]+", text.lower()) if word not in STOP_WORDS}


def stem(word: str) -> str:
    """Return a word without its ending: baked, baking and bakes have the same stem."""
    word = re.sub(r"(?<=[^s])s$", "", re.sub(r"ies$", "y", word))
    shorter = re.sub(r"(ing|ed|er|e)$", "", word)
    if len(shorter) < 3:
        return word
    return re.sub(r"([bdgmnprt])\1$", r"\1", shorter)  # stopping, stopped -> stop
