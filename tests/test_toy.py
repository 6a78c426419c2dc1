"""The toy language: its grammar is unambiguous, its probabilities sum to one, its entropy is what it says.

Numbers and digests that are pinned here are those of the first version: stories, questions and floors never change.
"""

import hashlib
import itertools
import json
import math
import random
from collections import Counter
from dataclasses import replace

import pytest

from nanollada.core import UserError
from nanollada.toy import (
    draw_story, entropy, entropy_table, is_valid, log_prob, nats, pasts, questions, read_story, render, sample, surprises,
    toy_language, vocabulary, word_list,
)


LANGUAGES = ["en", "zh"]
FACTS = ("toy fact", "tool fact", "friend fact")


def tiny(language: str, **more: str):
    "A language small enough to write out: two kinds and toys, three names, one word for the rest."
    lang = toy_language(language)
    short = {key: " ".join(list(words)[: 2 if key in ("kind", "home", "toy") else 1]) for key, words in lang.lists.items()}
    names = list(lang.lists["name"])
    return replace(lang, words=short | {"name": f"{names[0]} {names[1]} | {names[2]}"} | more)


def brute_force(lang) -> tuple[Counter, dict[str, float]]:
    "How many derivations each text has and its probability, from the words of the story alone: no rule object is asked."
    lists, texts, probability = lang.lists, Counter(), Counter()
    one = {key: next(iter(lists[key])) for key in lists}
    share = {key: {word: weight / sum(words.values()) for word, weight in words.items()} for key, words in lists.items()}
    homes = dict(zip(lists["kind"], lists["home"]))
    for hero, other, kind, other_kind, toy in itertools.product(*(lists[k] for k in ("name", "name", "kind", "kind", "toy"))):
        if hero == other:
            continue
        p = share["name"][hero] * share["name"][other] / (1 - share["name"][hero])
        p *= share["kind"][kind] * share["kind"][other_kind] * share["toy"][toy]
        for whose in (hero, other):
            for thing, told in itertools.product((toy, one["tool"]), itertools.product(("forward", "backward"), repeat=3)):
                slots = one | dict(hero=hero, other=other, kind=kind, other_kind=other_kind, toy=toy, whose=whose,
                                   thing=thing, home=homes[kind])
                ways = {"meeting": "plain", "event": "plain", "ending": "plain"} | dict(zip(FACTS, told))
                words = [templates[ways[name]].format(**slots) for name, templates in lang.sentences.items()]
                text = lang.gap.join(" ".join(words).split())
                for mark in (",", ".", "'s"):
                    text = text.replace(f" {mark}", mark)
                texts[text] += 1
                probability[text] += p / 2**5  # whose friend, which thing, three ways of telling
    return texts, probability


def digest(value: object) -> str:
    return hashlib.blake2b(json.dumps(value, ensure_ascii=False).encode(), digest_size=8).hexdigest()


@pytest.mark.parametrize("language, stories, asked, one_way, priced", [
    ("en", "9c996472de06d069", "8371d4393c354b86", "0fb5ebdaf17a297f", "5325956497dc64be"),
    ("zh", "a9d25247608e5314", "36b88c09f21b2caf", "7dfea88383dc1c42", "2739384a0a69faa1"),
    (None, "34d4d367fa0bf256", "8f14991f9b3c63d4", "ffec1a756d9d4c62", "294176e7ef64db28"),
])
def test_the_same_seed_gives_the_stories_and_questions_it_always_gave(language, stories, asked, one_way, priced):
    drawn = [sample(300, seed=seed, language=language) for seed in range(3)]
    assert digest(drawn) == stories
    assert digest([questions(text, language) for text in drawn[1]]) == asked
    ways = ("forward", "backward")
    assert digest([questions(text, language, way) for text in drawn[1] for way in ways]) == one_way
    assert digest([surprises(text, language) for text in drawn[2]]) == priced


def test_the_entropy_is_what_it_always_was():
    exactly = lambda value: pytest.approx(value, rel=1e-15)  # four units in the last place: since Python 3.12 `sum` rounds less
    assert (entropy("en"), entropy("zh"), entropy()) == tuple(map(exactly, (36.439131158089886, 36.439131158089886, 37.13227833864983)))
    tables = [{term: f"{nats:.12g}" for term, nats in entropy_table(toy_language(name)).items()} for name in LANGUAGES]
    assert [digest(table) for table in tables] == ["cc0f87594a790e83", "66bfd8e2d3fcb595"]
    assert [digest(sorted(vocabulary(name))) for name in ("en", "zh", None)] == [
        "83190770dba42bae", "f24116bfeb68d5d2", "18b10f6d903dd1f2"]


@pytest.mark.parametrize("name", LANGUAGES)
def test_no_option_begins_with_another(name):
    "Reading never meets a fork: each slot is a prefix code, and so are the first words of the ways of telling a sentence."
    lang = toy_language(name)
    for ways in lang.parts.values():
        slots = {part.slot for parts in ways.values() for part in parts if part.slot}
        options = {slot: {story[slot] for story, _ in pasts(lang, [slot])} for slot in slots}
        first = [word for parts in ways.values() for word in options.get(parts[0].slot, [parts[0].word])]
        for words in (*map(sorted, options.values()), sorted(first)):
            assert words and not any(b.startswith(a) for a, b in zip(words, words[1:]))
        assert len({frozenset(part.slot for part in parts if part.new) for parts in ways.values()}) == 1


@pytest.mark.parametrize("name", LANGUAGES)
def test_every_text_of_a_small_language_has_one_derivation_and_its_probability(name):
    lang = tiny(name)
    derivations, probability = brute_force(lang)
    assert set(derivations.values()) == {1}
    for text, p in probability.items():
        assert math.exp(log_prob(text, lang)) == pytest.approx(p, rel=1e-12)
    # Rounding of 10^4 terms, each to 2^-53 relative.
    assert math.fsum(math.exp(log_prob(text, lang)) for text in derivations) == pytest.approx(1, abs=1e-11)
    assert -math.fsum(p * math.log(p) for p in probability.values()) == pytest.approx(entropy(lang), abs=1e-10)


@pytest.mark.parametrize("name", LANGUAGES)
def test_nothing_else_is_in_the_small_language(name):
    "Swap any word for any other of the language: log_prob is finite exactly for the texts that brute force can derive."
    lang, rng = tiny(name), random.Random(0)
    derivations, _ = brute_force(lang)
    words = sorted(vocabulary(lang))
    outside = 0
    for text in rng.sample(sorted(derivations), 300):
        changed = text.replace(rng.choice([w for w in words if w in text]), rng.choice(words), 1)
        assert is_valid(changed, lang) == (changed in derivations)
        assert (log_prob(changed, lang) > -math.inf) == (changed in derivations)
        outside += changed not in derivations
    assert outside > 100


@pytest.mark.parametrize("language", ["en", "zh", None])
def test_monte_carlo_agrees_with_the_entropy(language):
    cost = [-log_prob(text, language) for text in sample(4000, seed=11, language=language)]
    mean = sum(cost) / len(cost)
    error = math.sqrt(sum((c - mean) ** 2 for c in cost) / (len(cost) - 1) / len(cost))
    assert abs(mean - entropy(language)) < 4 * error


def test_frequencies_follow_the_weights():
    "Counts of two words of weights 2 and 1, within 5 standard deviations of the binomial."
    n = 6000
    stories = [read_story(text, toy_language("en")) for text in sample(n, seed=5, language="en")]
    weights = toy_language("en").lists["verb"]
    for verb, count in Counter(story["verb"] for story in stories).items():
        p = weights[verb] / sum(weights.values())
        assert abs(count - n * p) < 5 * math.sqrt(n * p * (1 - p))


def test_both_languages_are_one_mixture():
    assert entropy() == pytest.approx(math.log(2) + (entropy("en") + entropy("zh")) / 2)
    text = sample(1, seed=3, language="zh")[0]
    assert log_prob(text) == pytest.approx(log_prob(text, "zh") - math.log(2))
    assert log_prob(text, "en") == -math.inf
    n = 2000
    english = sum(is_valid(text, "en") for text in sample(n, seed=4))
    assert abs(english - n / 2) < 5 * math.sqrt(n / 4)


@pytest.mark.parametrize("name", LANGUAGES)
def test_render_and_read_are_inverse(name):
    lang = toy_language(name)
    for seed in range(300):
        story = draw_story(lang, random.Random(seed))
        assert read_story(render(story, lang), lang) == story
        assert is_valid(f"\n {render(story, lang)} \n", name)


@pytest.mark.parametrize("name", LANGUAGES)
def test_size_of_the_language(name):
    assert len(vocabulary(name)) >= 150
    lengths = [len(surprises(text, name)) for text in sample(500, seed=1, language=name)]
    assert 30 <= min(lengths) and max(lengths) <= 80
    assert 30 <= entropy(name) <= 40


@pytest.mark.parametrize("name", LANGUAGES)
def test_who_was_named_first_decides_the_ending(name):
    lang = toy_language(name)
    homes = dict(zip(lang.lists["kind"], lang.lists["home"]))
    for text in sample(200, seed=8, language=name):
        story = read_story(text, lang)
        first, second = sorted((story["hero"], story["other"]), key=text.index)
        assert first == story["hero"] and text.rindex(first) > text.rindex(homes[story["kind"]]) - 60
        assert story["home"] == homes[story["kind"]]
        told = surprises(text, name)
        assert told[-2][0] == story["home"] and told[-2][1] == 0
        cut = text.rindex(first)
        assert not is_valid(text[:cut] + second + text[cut + len(first):], name)
        for home in set(homes.values()) - {story["home"]}:
            assert not is_valid(text.replace(story["home"], home), name)


@pytest.mark.parametrize("name", LANGUAGES)
def test_every_cut_and_every_doubled_character_is_outside(name):
    text = sample(1, seed=21, language=name)[0]
    assert is_valid(text, name)
    for i in range(len(text)):
        assert not is_valid(text[:i], name)
        assert not is_valid(text[:i] + text[i] + text[i:], name)
        assert not is_valid(text[:i] + text[i + 1:], name)
    assert not is_valid("", name) and not is_valid(text + text, name)


@pytest.mark.parametrize("language", ["en", "zh", None])
def test_surprises_sum_to_log_prob_and_depend_on_the_past_only(language):
    "Stories that agree up to a word agree on its surprise: it is -log p(word | words before)."
    prefixes: dict[tuple, float] = {}
    for text in sample(300, seed=2, language=language):
        told = surprises(text, language)
        assert sum(price for _, price in told) == pytest.approx(-log_prob(text, language), abs=1e-9)
        for i, (_, price) in enumerate(told):
            assert prefixes.setdefault(tuple(word for word, _ in told[: i + 1]), price) == price
    assert surprises("no such story", language) is None


def test_surprises_are_a_distribution_over_next_words():
    "In a small language, after any words, exp(-surprise) of the possible next words sums to 1."
    lang = tiny("en")
    following: dict[tuple, dict[str, float]] = {}
    for text in brute_force(lang)[0]:
        told = surprises(text, lang)
        for i, (word, price) in enumerate(told):
            following.setdefault(tuple(w for w, _ in told[:i]), {})[word] = math.exp(-price)
    assert all(math.fsum(nexts.values()) == pytest.approx(1) for nexts in following.values())


def test_same_seed_same_stories():
    assert sample(20, seed=3) == sample(20, seed=3)
    assert sample(20, seed=3)[:7] == sample(7, seed=3)
    assert sample(20, seed=3) != sample(20, seed=4)
    assert sample(0) == []


@pytest.mark.parametrize("name", LANGUAGES)
def test_questions_have_one_right_answer(name):
    "Three facts, asked both ways, no question twice, and the answers are the facts."
    lang = toy_language(name)
    for text in sample(200, seed=6, language=name):
        story = read_story(text, lang)
        facts = [(story["hero"], story["toy"]), (story["other"], story["tool"]), (story["whose"], story["friend"])]
        asked = questions(text, name)
        assert len({question for question, _ in asked}) == len(asked)
        backward, forward = questions(text, name, "backward"), questions(text, name, "forward")
        assert sorted(forward + backward) == sorted(asked)
        assert [answer for _, answer in backward] == [subject for subject, _ in facts]
        assert [answer for _, answer in forward] == [object_ for _, object_ in facts]
        assert all(answer in text for _, answer in asked)


def test_questions_read_well():
    text = ("On a cold Monday, Ann the pig met Tom the hen near the mill. The red kite belongs to Ann. "
            "Tom proudly owns the rope. Ann's best friend is Bo. Together they lost the rope. In the end Ann felt calm and went home to the sty.")
    assert questions(text) == [
        ("What does Ann own?", "kite"), ("Who owns the kite?", "Ann"), ("What does Tom own?", "rope"),
        ("Who owns the rope?", "Tom"), ("Who is Ann's best friend?", "Bo"), ("Whose best friend is Bo?", "Ann")]


def test_chain_rule_by_slot():
    lang = toy_language("en")
    table = entropy_table(lang)
    assert sum(table.values()) == pytest.approx(entropy("en"))
    assert table["home"] == 0
    assert table["whose"] == pytest.approx(math.log(2))
    assert nats(lang.lists["name"]) - math.log(16 / 15) - 0.02 < table["other"] < table["hero"]
    assert math.fsum(p for _, p in pasts(lang, ["whose", "thing"])) == pytest.approx(1)


def test_word_list_and_nats():
    assert word_list("a b | c") == {"a": 2, "b": 2, "c": 1}
    assert nats(word_list("a b c d")) == pytest.approx(math.log(4))
    assert nats({"only": 3}) == 0


@pytest.mark.parametrize("call, message", [
    (lambda: sample(-1), "n is -1"),
    (lambda: sample(2.5), "n is 2.5"),
    (lambda: sample(1, language="fr"), "language is 'fr'"),
    (lambda: log_prob("x", "fr"), "language is 'fr'"),
    (lambda: questions("Once upon a time"), "no story of the language"),
])
def test_errors_say_what_to_do(call, message):
    with pytest.raises(UserError, match=message):
        call()
