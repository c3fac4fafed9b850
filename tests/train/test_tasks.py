"""Each task's windows hold what the task promises."""

import dataclasses
import re

import numpy as np
import pytest

from kvjax.train import data, tasks


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("task", tasks.TASKS)
@pytest.mark.parametrize("length", [17, 65, 129, 1025])
def test_windows_have_their_length_and_ids_of_the_vocabulary(source, task, length):
    for seed in range(5):
        window, weights = tasks.TASKS[task](source, rng(seed), length)
        assert window.shape == weights.shape == (length,)
        assert window.dtype == np.int32 and weights.dtype == np.float32
        assert window.min() >= 0 and window.max() < source.vocab
        assert weights.sum() > 0


def test_prose_is_the_text_itself(source, tokens):
    window, _ = tasks.prose(source, rng(), 300)
    np.testing.assert_array_equal(window, data.Passages(tokens, seed=1).take(300))


def test_every_answer_was_told_once_before_it_is_asked(source):
    asked_in_all = 0
    for seed in range(40):
        window, _ = tasks.recall(source, rng(seed), 513)
        text = source.tokenizer.decode(window.tolist(), skip_special_tokens=False)
        facts = re.findall(r"The ([a-z ]+) is (\d{5})\. Remember it: (\d{5}) is the ([a-z ]+)\.", text)
        asked = re.findall(r"What is the ([a-z ]+)\? The \1 is (\d{5})\.", text)
        assert 1 <= len(facts) <= 4 and len(asked) == len(facts)
        assert all(number == again and subject == same for subject, number, again, same in facts)
        told = {subject: number for subject, number, *_ in facts}
        assert len(told) == len(set(told.values())) == len(facts)  # no subject and no number twice
        assert sorted(told.items()) == sorted(asked)
        for subject, number in asked:
            before = text[: text.index(f"What is the {subject}?")]
            assert before.count(tasks.statement(subject, number)) == 1
        asked_in_all += len(asked)
    assert 60 < asked_in_all < 140  # 1 to 4 a window: 100 expected


def test_questions_end_the_window_with_the_answer_as_the_passkey_test_asks_it(source):
    window, _ = tasks.recall(source, rng(7), 257)
    text = source.tokenizer.decode(window.tolist())
    prompt, answer = text[: text.rindex(" is ") + 3], text[text.rindex(" is ") + 3 :]
    assert re.fullmatch(r" \d{5}\.", answer)
    subject = re.search(r"The ([a-z ]+) is$", prompt).group(1)
    assert prompt.endswith(tasks.question(subject))


def test_short_windows_take_fewer_facts(source):
    window, _ = tasks.recall(source, rng(0), 65)
    assert source.tokenizer.decode(window.tolist()).count("Remember it") == 1


def test_copied_passage_comes_twice(source):
    for seed in range(20):
        # A corpus that counts: a token says where it stood, and each stands there once.
        counting = dataclasses.replace(source, passages=data.Passages(np.arange(2000), seed=0, piece=2000))
        window, _ = tasks.copied(counting, rng(seed), 129)
        values, first, count = np.unique(window, return_index=True, return_counts=True)
        size = int((count == 2).sum())
        assert set(count.tolist()) == {1, 2} and 16 <= size <= 43
        np.testing.assert_array_equal(values, np.arange(129 - size))
        start = first[count == 2][0]
        again = next(i for i in range(start + size, 129) if window[i] == window[start])
        np.testing.assert_array_equal(window[again : again + size], window[start : start + size])


def test_repeated_tokens_have_a_period_and_only_repetitions_count(source):
    periods = set()
    for seed in range(20):
        window, weights = tasks.repeated(source, rng(seed), 129)
        period = int((weights == 0).sum())
        np.testing.assert_array_equal(window[period:], window[:-period])
        np.testing.assert_array_equal(weights, np.arange(129) >= period)
        assert window.min() >= source.specials
        periods.add(period)
    assert len(periods) > 10 and max(periods) <= 64


def test_batch_is_deterministic_and_follows_the_mix(tokens, tokenizer):
    mix = {"prose": 0.25, "repeated": 0.75}

    def draw(position=0):
        source = tasks.Source(data.Passages(tokens, seed=1), tokenizer, vocab=4096)
        source.passages.position = position
        return tasks.draw_batch(source, rng(5), mix, rows=200, length=33)

    first, second, elsewhere = draw(), draw(), draw(1000)
    for a, b in zip(first, second):
        np.testing.assert_array_equal(a, b)
    assert not np.array_equal(first[0], elsewhere[0])
    window, weights, drawn = first
    assert window.shape == weights.shape == (200, 33)
    names = [list(tasks.TASKS)[i] for i in drawn]
    assert set(names) == {"prose", "repeated"} and 30 < names.count("prose") < 70
