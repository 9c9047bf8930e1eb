"""Theorem 1 of the paper and its lemmas (appendix B), on random small decision processes.

Policy improvement is `mavis_logits.core.tilting.tilt` with beta = 1 / eta, so that these tests tie the theory to the
code that steers. The second half is the language model's own case, a tree of tokens without discount, where the
targets of equation 6 (`mavis_training.trees.targets`) are held against the theorem.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from mavis_logits.core.tilting import kl_divergence, tilt
from mavis_training.trees.targets import log_ratios, node_targets
from mavis_training.trees.tree import Tree

seeds = st.integers(0, 100_000)


@dataclass
class Process:
    """A decision process of S states and A actions, with a reference policy.

    Attributes:
        reward: `[S, A]`, at most 1 in absolute value.
        following: `[S, A, S]`, probability of the next state.
        reference: `[S, A]`, log pi_ref.
        gamma: discount.
        eta: KL regularisation.
    """

    reward: np.ndarray
    following: np.ndarray
    reference: np.ndarray
    gamma: float
    eta: float


def improve(reference: np.ndarray, q: np.ndarray, eta: float) -> np.ndarray:
    """Equation 4: log of pi_ref exp(Q / eta) / Z, `[S, A]`."""
    return torch.log_softmax(tilt(torch.tensor(reference), torch.tensor(q), 1 / eta), dim=-1).numpy()


def divergence(policy: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL divergence of one log policy from another in every state, `[S]`."""
    return kl_divergence(torch.tensor(policy), torch.tensor(other), normalized=True).numpy()


def regularised(policy: np.ndarray, q: np.ndarray, reference: np.ndarray, eta: float) -> np.ndarray:
    """Equation 8: E_policy[Q - eta log(policy / pi_ref)], `[S]`."""
    return (np.exp(policy) * q).sum(axis=-1) - eta * divergence(policy, reference)


def backup(p: Process, policy: np.ndarray, q: np.ndarray) -> np.ndarray:
    """The operator T^pi of Lemma 1."""
    return p.reward + p.gamma * p.following @ regularised(policy, q, p.reference, p.eta)


def evaluate(p: Process, policy: np.ndarray) -> np.ndarray:
    """Q^pi, from the linear equations 8 and 9 themselves."""
    size = p.reward.size
    onward = (p.following[..., None] * np.exp(policy)).reshape(size, size)  # to the next state and action
    known = p.reward - p.gamma * p.eta * p.following @ divergence(policy, p.reference)
    return np.linalg.solve(np.eye(size) - p.gamma * onward, known.ravel()).reshape(p.reward.shape)


def optimum(p: Process) -> np.ndarray:
    """Q* by soft value iteration, which never names a policy: V(s) = eta log E_ref[exp(Q / eta)]."""
    q = np.zeros_like(p.reward)
    for _ in range(int(np.log(1e-13) / np.log(p.gamma)) + 20):
        q = p.reward + p.gamma * p.following @ (p.eta * np.logaddexp.reduce(p.reference + q / p.eta, axis=1))
    return q


@st.composite
def processes(draw):
    """Random processes in which every state can follow every action."""
    states, actions = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    rng = np.random.default_rng(draw(seeds))
    return Process(
        reward=rng.uniform(-1, 1, (states, actions)),
        following=rng.dirichlet(np.ones(states), (states, actions)),
        reference=random_policy(rng, states, actions),
        gamma=draw(st.floats(0.1, 0.9)),
        eta=draw(st.floats(0.05, 3)),
    )


def random_policy(rng: np.random.Generator, states: int, actions: int) -> np.ndarray:
    """A log policy `[S, A]` that gives every action some probability."""
    return np.log(0.99 * rng.dirichlet(np.ones(actions), states) + 0.01 / actions)


@given(processes(), seeds)
def test_lemma_1_evaluation_is_a_contraction(p, seed):
    """T^pi shrinks distances in the sup norm by gamma, for a constant distance by exactly that; its fixed point is the
    solution of equations 8 and 9, which repeated backups approach at that rate."""
    rng = np.random.default_rng(seed)
    policy = random_policy(rng, *p.reward.shape)
    one, other = rng.normal(scale=10, size=(2, *p.reward.shape))
    distance = np.abs(one - other).max()
    assert np.abs(backup(p, policy, one) - backup(p, policy, other)).max() <= p.gamma * distance + 1e-12
    np.testing.assert_allclose(backup(p, policy, one + 2.5), backup(p, policy, one) + p.gamma * 2.5, atol=1e-12)
    fixed = evaluate(p, policy)
    np.testing.assert_allclose(backup(p, policy, fixed), fixed, atol=1e-11)
    start = np.abs(one - fixed).max()
    for step in range(1, 20):
        one = backup(p, policy, one)
        assert np.abs(one - fixed).max() <= p.gamma**step * start + 1e-11


@given(processes(), seeds)
def test_lemma_2_the_value_grows_by_what_the_policy_moves(p, seed):
    """From any policy, Q^{k+1} - Q^k >= gamma E[eta KL(pi^k || pi^{k+1})] >= 0 in every state and action.

    The first inequality says more than the lemma: with every state in reach, Q stays the same only if the policy does.
    (In the paper's own telescoped sum the penalty's time index is one too low; what is checked needs no such sum.)
    """
    policy = random_policy(np.random.default_rng(seed), *p.reward.shape)
    for _ in range(4):
        q = evaluate(p, policy)
        following = improve(p.reference, q, p.eta)
        moved = p.gamma * p.eta * p.following @ divergence(policy, following)
        assert (moved >= -1e-12).all()
        assert (evaluate(p, following) - q >= moved - 1e-10).all()
        policy = following


def test_lemma_2_needs_every_state_in_reach():
    """The lemma's "equality only if the policy is the same" fails for a state that nothing leads to: its policy
    changes, and no Q sees it."""
    nowhere = Process(
        reward=np.array([[0.5, 0.5], [0.0, 1.0]]),
        following=np.array([[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]]),  # always to state 0
        reference=np.log(np.full((2, 2), 0.5)),
        gamma=0.5,
        eta=1.0,
    )
    q = evaluate(nowhere, nowhere.reference)
    policy = improve(nowhere.reference, q, nowhere.eta)
    assert divergence(policy, nowhere.reference)[1] > 0.1
    np.testing.assert_allclose(evaluate(nowhere, policy), q, atol=1e-12)


@given(processes(), seeds)
def test_lemma_3_the_tilted_policy_is_the_best(p, seed):
    """pi* = pi_ref exp(Q* / eta) / Z reaches eta log Z in every state, any other policy less, by eta KL(pi || pi*);
    no policy's Q exceeds Q*, and that of pi* is Q*."""
    best = optimum(p)
    optimal = improve(p.reference, best, p.eta)
    attained = regularised(optimal, best, p.reference, p.eta)
    np.testing.assert_allclose(attained, p.eta * np.logaddexp.reduce(p.reference + best / p.eta, axis=1), atol=1e-10)
    np.testing.assert_allclose(evaluate(p, optimal), best, atol=1e-10)
    rng = np.random.default_rng(seed)
    for _ in range(5):
        other = random_policy(rng, *p.reward.shape)
        shortfall = attained - regularised(other, best, p.reference, p.eta)
        np.testing.assert_allclose(shortfall, p.eta * divergence(other, optimal), atol=1e-9)
        assert (evaluate(p, other) <= best + 1e-10).all()


@given(processes())
def test_theorem_1_policy_iteration_converges_to_the_optimum(p):
    """From pi_ref, the distance to Q* falls by gamma at least at every iteration, and pi^k goes to pi*."""
    best = optimum(p)
    q = evaluate(p, p.reference)
    policy = p.reference
    for _ in range(60):
        distance = np.abs(best - q).max()
        policy = improve(p.reference, q, p.eta)
        q = evaluate(p, policy)
        assert np.abs(best - q).max() <= p.gamma * distance + 1e-9
    np.testing.assert_allclose(q, best, atol=1e-8)
    np.testing.assert_allclose(np.exp(policy), np.exp(improve(p.reference, best, p.eta)), atol=1e-6)


# The language model's case: a state is a prefix, an action a token, nothing is discounted, and the reward comes at the
# end. A tree has a node for every prefix, so Q(s, a) is the value of the node s + a.


@st.composite
def languages(draw, depth: int = 4):
    """Every prefix of a small language as a tree of one-token nodes, log pi_ref in `logp_ref`, and R(y) per leaf."""
    rng = np.random.default_rng(draw(seeds))
    parent, tokens, reference, terminal, frontier = [], [], [], [], [-1]
    levels = draw(st.integers(1, depth))
    for level in range(1, levels + 1):
        following = []
        for prefix in frontier:
            choices = random_policy(rng, 1, int(rng.integers(2, 4)))[0]
            for token, logp in enumerate(choices):
                parent.append(prefix)
                tokens.append(token)
                reference.append(logp)
                terminal.append(level == levels or bool(rng.random() < 0.2))
                if not terminal[-1]:
                    following.append(len(parent) - 1)
        frontier = following
    n = len(parent)
    tree = Tree("p", "p", np.array([7]), np.array(tokens), np.array(parent), np.arange(n), np.ones(n, int),
                np.array(reference), np.array(reference), np.array(terminal))  # fmt: skip
    return tree, rng.normal(size=len(tree.leaves()))


def groups(tree: Tree) -> list[np.ndarray]:
    """The choices of every prefix, longest prefixes last."""
    return [tree.children(int(node)) for node in np.unique(tree.parent)]


def value_of(tree: Tree, policy: np.ndarray, rewards: np.ndarray, eta: float) -> np.ndarray:
    """Q^pi of every node, `[n]`: R at a leaf, above it the regularised value of its children (equations 8 and 9)."""
    q = np.zeros(len(tree))
    q[tree.leaves()] = rewards
    for choices in reversed(groups(tree)):
        above = tree.parent[choices[0]]
        if above >= 0:
            q[above] = regularised(policy[choices], q[choices], tree.logp_ref[choices], eta)
    return q


def improved(tree: Tree, prior: np.ndarray, q: np.ndarray, eta: float) -> np.ndarray:
    """`improve` for every prefix of a language, `[n]`."""
    policy = np.empty(len(tree))
    for choices in groups(tree):
        policy[choices] = improve(prior[None, choices], q[None, choices], eta)[0]
    return policy


def sequence_logp(tree: Tree, logp: np.ndarray) -> np.ndarray:
    """Log probability of every whole sequence, `[leaves]`, from that of each step, `[n]`."""
    return np.array([logp[tree.path(leaf)].sum() for leaf in tree.leaves()])


def optimal_policy(tree: Tree, rewards: np.ndarray, eta: float) -> np.ndarray:
    """Log pi* of every node, by as many iterations as the language has levels."""
    policy = tree.logp_ref
    for _ in range(int(tree.end().max())):
        policy = improved(tree, tree.logp_ref, value_of(tree, policy, rewards, eta), eta)
    return policy


@given(languages(), st.floats(0.1, 3))
def test_a_language_model_is_optimal_after_as_many_iterations_as_tokens(language, eta):
    """Policy iteration on a tree reaches pi*(y) = pi_ref(y) exp(R(y) / eta) / Z over whole sequences (equation 5)
    after at most T iterations, since each makes one more level exact from the end; the next one changes nothing."""
    tree, rewards = language
    policy = optimal_policy(tree, rewards, eta)
    whole = sequence_logp(tree, tree.logp_ref) + rewards / eta
    np.testing.assert_allclose(sequence_logp(tree, policy), whole - np.logaddexp.reduce(whole), atol=1e-9)
    again = improved(tree, tree.logp_ref, value_of(tree, policy, rewards, eta), eta)
    np.testing.assert_allclose(again, policy, atol=1e-9)


@given(languages(depth=3), st.floats(0.1, 2), seeds)
def test_targets_are_the_theorems_values_less_the_penalty_of_the_prefix(language, eta, seed):
    """Where samples come in exact proportion to the policy, equation 6's target with zeta = eta is Q^pi less
    eta log(pi / pi_ref) of the prefix itself: the equation takes the ratio of the whole y, the theorem of what follows.

    The prefix's part differs between the candidates of a step. Hence Theorem 1's improvement tilts pi_ref by targets
    that have it given back, or, which is the same, the *current* policy by the targets as they are.
    """
    language_tree, rewards = language
    tree, policy, origin = proportional_samples(language_tree, np.random.default_rng(seed))
    q = value_of(language_tree, policy, rewards, eta)
    reward_of = dict(zip(language_tree.leaves().tolist(), rewards, strict=True))
    leaf_rewards = np.array([[reward_of[origin[leaf]]] for leaf in tree.leaves()])
    targets = node_targets(tree, leaf_rewards, zeta=eta)[:, 0]
    np.testing.assert_allclose(targets + eta * log_ratios(tree), q[origin], atol=1e-9)
    continuation = node_targets(tree, leaf_rewards, zeta=eta, penalty="continuation")[:, 0]
    np.testing.assert_allclose(continuation, q[origin], atol=1e-9)
    # Per prefix of the language (a node's samples all have the same target): the two forms of the same improvement.
    by_node = np.zeros(len(language_tree))
    by_node[origin] = targets
    for choices in groups(language_tree):
        by_theorem = improve(language_tree.logp_ref[None, choices], q[None, choices], eta)
        by_targets = improve(policy[None, choices], by_node[None, choices], eta)
        np.testing.assert_allclose(by_theorem, by_targets, atol=1e-9)


@given(languages(), st.floats(0.1, 3))
def test_targets_of_the_optimal_policy_are_all_the_same(language, eta):
    """Under pi*, R(y) - eta log(pi*(y) / pi_ref(y)) is eta log Z for every y. Equation 6 with zeta = eta then has no
    more to say of any prefix: tilting pi_ref by it would undo the steering. A zeta well below eta keeps a signal."""
    tree, rewards = language
    tree.logp_gen = optimal_policy(tree, rewards, eta)
    whole = sequence_logp(tree, tree.logp_ref) + rewards / eta
    targets = node_targets(tree, rewards[:, None], zeta=eta)[:, 0]
    np.testing.assert_allclose(targets, eta * np.logaddexp.reduce(whole), atol=1e-9)


def proportional_samples(language: Tree, rng: np.random.Generator) -> tuple[Tree, np.ndarray, np.ndarray]:
    """A tree of samples of a policy whose probabilities are quarters, four children a node, in exact proportion.

    Returns:
        The tree, the log policy of every node of the language, and for every sampled node which of these it is.
    """
    policy = np.empty(len(language))
    counts = np.zeros(len(language), dtype=int)
    for choices in groups(language):
        rest = rng.multinomial(4 - len(choices), np.full(len(choices), 1 / len(choices)))
        counts[choices] = 1 + rest  # every choice is sampled: Q is compared everywhere
        policy[choices] = np.log(counts[choices] / 4)
    parent, origin, frontier = [], [], [(-1, -1)]
    while frontier:
        following = []
        for sample, prefix in frontier:
            for node in np.repeat(language.children(prefix), counts[language.children(prefix)]):
                parent.append(sample)
                origin.append(int(node))
                if not language.terminal[node]:
                    following.append((len(parent) - 1, int(node)))
        frontier = following
    where = np.array(origin)
    n = len(where)
    tree = Tree("p", "p", language.prompt_tokens, language.tokens[where], np.array(parent), np.arange(n),
                np.ones(n, int), policy[where], language.logp_ref[where], language.terminal[where])  # fmt: skip
    return tree, policy, where
