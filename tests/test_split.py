"""Splits are scikit-learn's, without its import."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from sklearn.model_selection import train_test_split

from erpe.training.split import stratified


@given(st.data())
def test_a_split_is_that_of_scikit_learn(data):
    counts = data.draw(st.lists(st.integers(2, 60), min_size=2, max_size=10))
    labels = np.random.default_rng(data.draw(st.integers(0, 99))).permutation(np.repeat(np.arange(len(counts)), counts))
    size = data.draw(st.integers(len(counts), len(labels) - len(counts)))
    second = data.draw(st.sampled_from([size, size / len(labels)]))
    seed = data.draw(st.integers(0, 2**32 - 1))
    wanted = train_test_split(np.arange(len(labels)), test_size=second, random_state=seed, stratify=labels)
    for part, expected in zip(stratified(labels, second, seed), wanted, strict=True):
        assert part.tolist() == sorted(expected.tolist())
