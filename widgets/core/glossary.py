"""The glossary: what the terms of controls, column headings and curve titles mean, with the paper's symbols and equations."""

from __future__ import annotations

import re

TERMS = {
    "advantage": "A, a rollout's reward minus the mean reward of its advantage group, divided by the group's "
    "standard deviation (GRPO). Rollouts with a positive advantage become more likely.",
    "advantage group": "The rollouts whose rewards are compared with each other: all rollouts of a sequence, as in "
    "the paper, or those of one position (prefix), which needs n >= 2.",
    "answer loss": "The next-token loss on the reference answers alone, in nats per token.",
    "base": "The model before training.",
    "baseline (no adaptation)": "The model before it is adapted to a prompt.",
    "binary reward": "The fraction of the k rollout tokens that equal the reference token at their position "
    "(equation 11).",
    "chunk": "A sequence is divided into c chunks of equal length, and one position is sampled from each (equation "
    "6).",
    "clip fraction": "The share of rollout tokens whose probability ratio to the policy that sampled them lies "
    "beyond the clip range (1 - epsilon to 1 + epsilon), so that they give no gradient.",
    "contains answer": "The share of answers that contain a reference answer.",
    "cosine of the NSP and NTP gradients": "The cosine of the angle between the gradients of both losses: 1 if they "
    "point in the same direction, 0 if they are unrelated.",
    "cosine reward": "The cosine similarity of the hidden states of a rollout and of the reference, averaged over "
    "the k tokens (equation 9), from -1 to 1.",
    "DFT": "The next-token loss in which each token is weighted by its own probability (Wu et al., 2025).",
    "distinct questions": "The number of different questions among the prompts: the same question in several prompts "
    "counts once, since its answers are not independent.",
    "effect of a write": "By how much a prediction's log-probability would change, in nats, without what a token has "
    "written: estimated from the gradient and summed over the heads. Erase computes it exactly.",
    "effective rank": "The exponential of the entropy of a state's normalised singular values (Roy and Vetterli, "
    "2007): about how many directions the state uses.",
    "entropy": "H, the model's uncertainty about a token before it has read it (equation 5), in nats: 0 if it is "
    "certain.",
    "equal compute": "It is trained for more steps, so that it costs about as much as REFINE.",
    "edit reward": "One minus the edit distance between a rollout and the reference, divided by k (ours).",
    "exact reward": "It is 1 if all k tokens of a rollout equal the reference, else 0 (ours).",
    "exact recall": "The share of questions about planted facts whose whole answer the model predicts right.",
    "expected match": "The next-token loss minus the probability that a rollout would equal the text, where the next "
    "tokens need the memory (ours). The probability is computed, so that no rollout is sampled.",
    "exact-match rate": "The fraction that equals the reference: of a rollout's k tokens (equation 11), or of all "
    "answers.",
    "F1": "The overlap of an answer's words with those of the reference: the harmonic mean of precision and recall.",
    "fast weights": "The matrices of fixed size into which the model writes what it has read (equation 1).",
    "fewer updates": "It makes as many updates as in the paper's release, which are fewer than those of REFINE.",
    "gradient norm": "The length (L2 norm) of the gradient of an update, before it is clipped.",
    "held-out remainder": "The end of a document that is not adapted to. Its loss shows whether adaptation helps on "
    "unseen text.",
    "Holm's correction": "It raises the p-values of several comparisons so that, if there is no difference at all, the "
    "chance of any p below 0.05 stays 5 % (Holm, 1979).",
    "hybrid reward": "The sum of cosine reward and binary reward (equation 12).",
    "learning rate": "The step size of the optimizer's updates.",
    "log-probability": "The logarithm of the probability that the model gives a token, in nats: 0 is certain, and "
    "lower is less likely.",
    "long-short difference": "A token's log-probability given the whole prefix minus that given only the last "
    "tokens, in nats. It is large where the prediction needs the memory.",
    "LongPPL": "The perplexity on key tokens, which the model before training predicts clearly better from the whole "
    "prefix than from the last tokens (Fang et al., 2024). Lower is better.",
    "LongCE": "The next-token loss with more weight on tokens that the model predicts better from the whole prefix than "
    "from the last tokens (Fang et al., 2024).",
    "max answer tokens": "An answer ends after this number of tokens at the latest.",
    "method": "What the model is trained or adapted with, such as SFT, REFINE or expected match. Each has its own entry.",
    "nested": "Post-training that first updates the weights on the prompts, then on the answers (section 4.3).",
    "next-sequence loss": "The clipped policy loss of the rollouts (equations 3, 4 and 10). REFINE adds it to the "
    "next-token loss with the weight lambda_RL.",
    "one inner update": "It makes a single update on each batch of prompts, as in the paper's release.",
    "norm of the state": "The Frobenius norm of a fast-weight matrix: how much is written in it.",
    "NTP accuracy": "The share of tokens that are the model's most likely next token.",
    "NTP loss": "The next-token loss (equation 2): the mean negative log-probability of the tokens, in nats. Lower "
    "is better.",
    "placebo": "REFINE with the rewards exchanged at random among the rollouts, so that they say nothing about them. A "
    "gain of REFINE over it comes from the rewards.",
    "position": "The index of the last token of a prefix, counted from 0. A rollout starts with the token after it.",
    "probability of the next k tokens": "The probability that the model gives to the whole reference continuation, "
    "averaged over the sampled positions.",
    "rank": "The place of the reference token when all tokens are sorted by their probability: 1 is the model's "
    "first choice.",
    "reference": "The tokens that follow the prefix in the document, with which a rollout is compared; for a "
    "question, the right answer.",
    "REFINE": "The paper's method: the next-token loss plus a loss that rewards rollouts for coming close to the text. "
    "They start where the model is uncertain.",
    "REFINE by memory": "REFINE with rollouts that start where the next tokens need the memory, eight from each position, "
    "and with the binary reward (ours).",
    "relative change of the state": "How much a fast-weight matrix has changed since the previous position, relative "
    "to its norm.",
    "reward": "R, a number that says how close a rollout comes to the reference. The choice of reward decides what "
    "close means.",
    "rollout": "A continuation of k tokens that the model samples from a prefix of the document (equation 7).",
    "rollout length": "The number of tokens of a rollout (k).",
    "rollouts per position": "The number of rollouts sampled from each position (n).",
    "sampled position": "A position from which rollouts start; one is sampled per chunk (equation 6).",
    "sampling probability": "The probability with which a position is sampled within its chunk (equation 6). The "
    "probabilities of a chunk sum to 1.",
    "seed": "The number that determines all random draws. The same settings and seed give the same result.",
    "selection": "How the position of each chunk is chosen: by entropy as in the paper, uniformly, at the highest or "
    "lowest entropy (table 7), or by memory or copies (ours).",
    "SFT": "Fine-tuning with the next-token loss alone.",
    "signal-to-noise of the NSP gradient": "The squared norm of the mean gradient of the next-sequence loss, divided "
    "by its variance between halves of a batch. Near 0, an update is mostly noise.",
    "smoothing": "The width, in tokens, of the moving average over the entropies before positions are sampled (below "
    "equation 5). 1 does not smooth.",
    "steps": "The number of updates of the weights.",
    "tau": "The temperature of the softmax over the entropies of a chunk (equation 6). A low tau picks the most "
    "uncertain position, and a high one samples almost uniformly.",
    "temperature": "The temperature at which rollout tokens are sampled. 1 samples from the model's own "
    "distribution, and lower values favour likely tokens.",
    "test-time training": "Updating the weights on a prompt before answering it (section 4.4). The weights are "
    "restored afterwards.",
    "tokens per second": "The number of tokens trained on per second, over the last updates.",
    "training reward": "The mean reward of the rollouts of an update, with the reward that the run is trained with.",
    "weighted NTP": "The next-token loss plus that of the tokens that need the memory alone (ours).",
    "weights to save": "The current weights, or those that a compared method ended with. Copies are kept until Reset or "
    "the next comparison.",
    "write strength": "How strongly a token is written into a head's fast weights: beta of the delta rule (from 0 to "
    "1, or to 2 if negative eigenvalues are allowed), or LaCT's mean learning rate.",
}  # fmt: skip
"""Term -> one or two sentences."""

LABELS = {
    "reference answer": "reference",
    "answer accuracy": "NTP accuracy",
    "answers containing a reference": "contains answer",
    "binary": "binary reward",
    "change since the previous position": "relative change of the state",
    "chunks": "chunk",
    "clipped ratios": "clip fraction",
    "cosine": "cosine reward",
    "effect of the write": "effect of a write",
    "effective rank of the state": "effective rank",
    "group_by": "advantage group",
    "group_size": "rollouts per position",
    "key-token loss": "LongPPL",
    "log p": "log-probability",
    "logprob": "log-probability",
    "loss": "NTP loss",
    "loss on the held-out remainder": "held-out remainder",
    "loss on the remainder": "held-out remainder",
    "lr": "learning rate",
    "next-token loss": "NTP loss",
    "none": "baseline (no adaptation)",
    "ntp loss on the held-out remainder": "held-out remainder",
    "num_chunks": "chunk",
    "p (holm)": "Holm's correction",
    "rank of the reference token": "rank",
    "references": "reference",
    "rollout_length": "rollout length",
    "sampled positions": "sampled position",
    "sampling probability within chunk": "sampling probability",
    "signed effect": "effect of a write",
    "smoothing_kernel": "smoothing",
    "tokens (k)": "rollout length",
    "tokens per rollout": "rollout length",
    "tokens/s": "tokens per second",
}
"""Label, in lower case, -> the term that it stands for, where the two differ."""

AROUND = re.compile(
    r"^(held-out|mean|change in|difference in|reward vs)\s+"
    r"|\s*\([^()]*\)$|,? so far$|\s+(before|after|of the prompt|of the step's rollouts)$|, adapted part$|:.*$"
)
"""Parts of a label that do not change which term it stands for."""

_BY_NAME = {term.lower(): term for term in TERMS}


def term_of(label: str) -> str | None:
    """Returns the term that a label stands for, such as `LongPPL` for "Held-out LongPPL", or None."""
    name = " ".join(label.lower().split())
    while name:
        if found := _BY_NAME.get(name) or LABELS.get(name):
            return found
        name, before = AROUND.sub("", name, count=1).strip(), name
        if name == before:
            return None
    return None


def explain(label: str) -> str:
    """Returns the sentences about the term that a label stands for, for its tooltip; empty if the glossary lacks it."""
    term = term_of(label)
    return "" if term is None else TERMS[term]


def page() -> str:
    """Returns the glossary as Markdown: the text of docs/glossary.md."""
    lines = [
        "# Glossary",
        "",
        "These are the tooltips of the workbench's controls, column headings and curve titles. Equations, tables and",
        "sections are those of the paper ([arXiv 2602.16704](https://arxiv.org/abs/2602.16704)); [method.md](method.md)",
        "has the details. `make docs` writes this page from `widgets/core/glossary.py`.",
        "",
        "| term | meaning |",
        "|---|---|",
    ]
    lines += [f"| {term} | {TERMS[term]} |" for term in sorted(TERMS, key=str.lower)]
    return "\n".join(lines) + "\n"
