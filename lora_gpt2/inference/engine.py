"""The inference engine: continuous batching over one static KV cache, each sequence with its own mix of adapters.

A step decodes a token for every running sequence (or several, see `drafting`), advances beam searches, admits waiting
sequences and prefills their prompts together. Each sequence samples with its own random numbers, so its output does
not depend on what else is in the batch (except for rounding of the logits), nor on what its row of the cache held
before. A sequence whose logits are not finite finishes alone, with an error. Omitted: paged attention (a sequence of
GPT-2 S is 38 MB) and chunked prefill.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

from lora_gpt2.core.errors import UsageError
from lora_gpt2.inference.beam import BeamSearch
from lora_gpt2.inference.cuda_graphs import CudaGraphDecoder
from lora_gpt2.inference.decoder import Decoder, NextTokens
from lora_gpt2.inference.device_sampling import UNDECIDED
from lora_gpt2.inference.drafting import Drafter, limit_drafts
from lora_gpt2.inference.prefixes import BLOCK, WORTHWHILE, count_shared
from lora_gpt2.inference.sampling import sample_tokens
from lora_gpt2.inference.scheduler import SEQUENCE_ERRORS, Scheduler
from lora_gpt2.inference.sequence import SequenceState, TokenLogprobs
from lora_gpt2.inference.session import Session, check_logits
from lora_gpt2.model.kv_cache import KVCache


class Engine:
    """Generates up to `max_num_seqs` sequences at a time, each of up to `max_tokens` tokens, prompt included."""

    def __init__(self, session: Session, max_num_seqs: int, max_tokens: int) -> None:
        base = session.base
        self.session = session
        capacity = min(max_tokens, base.config.n_positions)
        self.cache = KVCache(base.config, max_num_seqs, capacity, base.model.wte.weight)
        self.scheduler = Scheduler(session, self.cache, max_num_seqs)
        is_cuda = base.runtime.device.type == "cuda"
        self.decoder = CudaGraphDecoder(session, self.cache) if is_cuda else Decoder(session, self.cache)

    @property
    def is_busy(self) -> bool:
        """True while a sequence is waiting or running."""
        return bool(self.scheduler.waiting or self.num_running)

    @property
    def num_running(self) -> int:
        """Number of running sequences; a beam search counts once for each beam."""
        return self.scheduler.num_running

    @property
    def num_waiting(self) -> int:
        """Number of sequences in the queue."""
        return len(self.scheduler.waiting)

    def submit(self, sequence: SequenceState) -> None:
        """Queues a sequence."""
        self.scheduler.waiting.append(sequence)

    def stop(self, sequence: SequenceState, reason: str) -> str:
        """Finishes a sequence as it is; returns the text that was held back.

        It leaves the queue at once, and its row at the next step.
        """
        text = "" if sequence.finish_reason else sequence.finish(reason)
        self.scheduler.withdraw(sequence)
        return text

    def stop_all(self, reason: str) -> list[tuple[SequenceState, str]]:
        """Finishes every sequence, running or waiting; returns them with the text that was held back."""
        stopped = [(sequence, self.stop(sequence, reason)) for sequence in self.scheduler.sequences]
        self.scheduler.drop_finished()
        return stopped

    @torch.inference_mode()
    def step(self) -> list[tuple[SequenceState, str]]:
        """Advances everything by one token; returns the sequences with the text that each completed.

        Sequences that finished in this step are included, with the text that was held back.
        """
        scheduler = self.scheduler
        self._drop_finished()
        outputs = self._reroute()
        outputs += self._decode()
        outputs += self._search()
        admission = scheduler.admit()
        outputs += [(sequence, "") for sequence in admission.failed]
        outputs += self._prefill(admission.to_sample)
        for sequence in admission.to_search:
            try:
                if (search := sequence.shared_search.search) is None:
                    search = sequence.shared_search.search = BeamSearch(
                        self.session, sequence.prompt_ids, sequence.mix, sequence.max_new_tokens, sequence.settings
                    )
            except SEQUENCE_ERRORS as error:
                outputs.append((sequence, sequence.fail(error)))
                scheduler.unpin(sequence)
            else:
                scheduler.searches.append((sequence, search))
        self._drop_finished()
        return outputs

    def _drop_finished(self) -> None:
        """Frees the rows of finished sequences; what they read and wrote is kept for texts that begin alike."""
        for row, sequence in enumerate(self.scheduler.running):
            if sequence.finish_reason and not sequence.error:
                self._keep_prefix(row, sequence, sequence.num_cached)
        self.scheduler.drop_finished()

    def _keep_prefix(self, row: int, sequence: SequenceState, num_tokens: int) -> None:
        if (key := self.session.identify(sequence.mix)) is not None:
            self.session.prefixes.store(key, sequence.ids[:num_tokens], self.cache.buffer[:, :, row, :, :num_tokens])

    def reset(self) -> None:
        """Forgets every sequence, and what it pinned, without finishing it; the memory of the cache is kept."""
        self.scheduler.clear()
        self.decoder.reset()

    def _reroute(self) -> list[tuple[SequenceState, str]]:
        """Lets sequences that are due choose their adapter again; returns those that failed in it."""
        failed = []
        for sequence in [sequence for sequence in self.scheduler.running if sequence.is_due]:
            try:
                route = sequence.routes[-1].router.route(sequence.tokenizer.decode(sequence.ids), len(sequence.new_ids))
            except SEQUENCE_ERRORS as error:
                failed.append((sequence, sequence.fail(error)))
                continue
            sequence.routes.append(route)
            if route.mix != sequence.mix:
                self.scheduler.readmit(sequence, route.mix)
        self._drop_finished()
        return failed

    def _search(self) -> list[tuple[SequenceState, str]]:
        """Advances each beam search by a token; returns its sequences with their texts, once it is done."""
        outputs = []
        for search in dict.fromkeys(search for _, search in self.scheduler.searches):
            own = [sequence for sequence, other in self.scheduler.searches if other is search]
            try:
                if not search.is_done:
                    search.advance()
                outputs += [(sequence, _take_hypothesis(sequence, search)) for sequence in own]
            except SEQUENCE_ERRORS as error:
                outputs += [(sequence, sequence.fail(error)) for sequence in own]
        return outputs

    def _decode(self) -> list[tuple[SequenceState, str]]:
        """Advances each running sequence by a token; returns them with the text that it completed."""
        running = self.scheduler.running
        if not running:
            return []
        drafts = self._draft(running)
        return self._accept_drafts(running, drafts) if any(drafts) else sample(running, self.decoder.step(running))

    def _draft(self, running: Sequence[SequenceState]) -> list[list[int]]:
        """Returns what each running sequence drafts; nothing where a pass over several tokens costs much more."""
        longest = max(sequence.num_cached for sequence in running)
        most = min(limit_drafts(len(running)), self.cache.capacity - longest - 1)
        if not self.session.can_draft or most < 1:
            return [[] for _ in running]
        return [sequence.draft(most) for sequence in running]

    def _accept_drafts(
        self, running: Sequence[SequenceState], drafts: Sequence[Sequence[int]]
    ) -> list[tuple[SequenceState, str]]:
        """Samples behind each drafted token for as long as the drafts are what is sampled."""
        logits, texts = self.decoder.check_drafts(running, drafts), [""] * len(running)
        active = list(range(len(running)))
        for offset in range(logits.shape[1]):
            following = NextTokens(logits=logits[active, offset], tokens=[UNDECIDED] * len(active))
            for index, (_, text) in zip(active, sample([running[index] for index in active], following), strict=True):
                texts[index] += text
            going = [index for index in active if not running[index].finish_reason and offset < len(drafts[index])]
            active = [index for index in going if running[index].new_ids[-1] == drafts[index][offset]]
            if not active:
                break
        for row, (sequence, draft) in enumerate(zip(running, drafts, strict=True)):
            num_accepted = sequence.num_cached - int(self.cache.lengths[row]) + len(draft)
            if draft and sequence.drafter is not None:
                sequence.drafter.record(max(0, num_accepted))
            self.cache.truncate(row, min(sequence.num_cached, int(self.cache.lengths[row])))
        return list(zip(running, texts, strict=True))

    def _prefill(self, admitted: list[SequenceState]) -> list[tuple[SequenceState, str]]:
        """Prefills the prompts of admitted sequences and samples their first tokens; they are running afterwards."""
        outputs, leaders, followers = [], *split_by_beginning(self.session, admitted)
        for part in (leaders, followers):
            prefixes = [self._find_prefix(sequence) for sequence in part]
            for group in group_by_room(part, prefixes, self.cache.capacity):
                first = len(self.scheduler.running)
                sequences = [part[index] for index in group]
                following = self.decoder.prefill(sequences, first, [prefixes[index] for index in group])
                for row, sequence in enumerate(sequences):
                    if sequence.settings.speculate:
                        sequence.drafter = Drafter(self.session.find_successors(sequence.mix))
                    if sequence.scores_prompt and not sequence.new_ids:
                        self._score_prompt(row, sequence)
                    self._keep_prefix(first + row, sequence, len(sequence.ids))
                self.scheduler.running += sequences
                outputs += sample(sequences, following)
        return outputs

    def _find_prefix(self, sequence: SequenceState) -> list[Tensor]:
        key = None if sequence.scores_prompt else self.session.identify(sequence.mix)
        return [] if key is None else self.session.prefixes.find(key, sequence.ids)

    def _score_prompt(self, row: int, sequence: SequenceState) -> None:
        """Gives each token of the prompt but the first its log-probabilities."""
        for targets, logits in self.decoder.iter_prompt_logits(row, sequence):
            try:
                check_logits(logits[:, : sequence.tokenizer.vocab_size], sequence.mix)
            except SEQUENCE_ERRORS as error:
                sequence.fail(error)
                return
            sequence.prompt_logprobs += [
                TokenLogprobs.from_logits(line, token, sequence.settings.logprobs, sequence.tokenizer.vocab_size)
                for line, token in zip(logits, targets, strict=True)
            ]


def split_by_beginning(
    session: Session, sequences: Sequence[SequenceState]
) -> tuple[list[SequenceState], list[SequenceState]]:
    """Returns the sequences to read first, and those that then have a beginning in common with one of them."""
    found: tuple[list[SequenceState], list[SequenceState]] = ([], [])
    if not session.prefixes.max_bytes:
        return list(sequences), []
    leaders: dict[object, SequenceState] = {}
    for sequence in sequences:
        key = None if sequence.scores_prompt else session.identify(sequence.mix)
        leader = leaders.setdefault((key, tuple(sequence.ids[:WORTHWHILE])), sequence)
        shared = 0
        if key is not None and leader is not sequence:
            shared = count_shared(leader.ids, sequence.ids[:-1])
            shared -= len(session.prefixes.find(key, sequence.ids)) * BLOCK
        found[shared >= WORTHWHILE].append(sequence)
    return found


def group_by_room(
    sequences: Sequence[SequenceState], prefixes: Sequence[Sequence[Tensor]], capacity: int
) -> list[list[int]]:
    """Returns the indices of sequences that are read together: the longest beginning and rest of a group fit a row."""
    groups, room = list[list[int]](), (0, 0)
    for index, (sequence, blocks) in enumerate(zip(sequences, prefixes, strict=True)):
        known = len(blocks) * BLOCK
        wanted = (max(room[0], known), max(room[1], len(sequence.ids) - known))
        if not groups or sum(wanted) > capacity:
            groups.append([])
            wanted = (known, len(sequence.ids) - known)
        groups[-1].append(index)
        room = wanted
    return groups


@contextmanager
def borrow_engine(session: Session, max_num_seqs: int, max_tokens: int) -> Iterator[Engine]:
    """Yields an idle engine with room for so many sequences of so many tokens.

    On a GPU it is the one that this session used last, if that is large enough: its steps are captured already. One in
    which anything failed is not used again, because a step that was left half done may have lost sequences.
    """
    keeps = session.base.runtime.device.type == "cuda"
    engine, session.idle_engine = session.idle_engine, None
    room = min(max_tokens, session.base.config.n_positions)
    if not isinstance(engine, Engine) or engine.cache.batch_size < max_num_seqs or engine.cache.capacity < room:
        if keeps:  # the next call may want a little more
            max_num_seqs, max_tokens = 1 << (max_num_seqs - 1).bit_length(), 1 << (max_tokens - 1).bit_length()
        engine = Engine(session, max_num_seqs, max_tokens)
    try:
        yield engine
    except GeneratorExit:  # who read its texts wants no more of them, between two steps
        engine.stop_all("interrupted")
        session.idle_engine = engine if keeps else None
        raise
    except BaseException:
        engine.reset()
        raise
    session.idle_engine = engine if keeps else None


def sample(sequences: Sequence[SequenceState], following: NextTokens) -> list[tuple[SequenceState, str]]:
    """Takes the next token of each sequence, from the device or sampled here; returns them with the text it completed.

    An error in doing so finishes its sequence and no other.
    """
    texts, rest = dict[int, str](), list[int]()
    for index, sequence in enumerate(sequences):
        if sequence.finish_reason or not sequence.max_new_tokens:
            texts[index] = "" if sequence.finish_reason else sequence.finish("length")
        elif sequence.is_plain and following.tokens[index] >= 0:
            texts[index] = _accept(sequence, following.tokens[index], None)
        else:
            rest.append(index)
    if rest:
        chosen = _sample_here([sequences[index] for index in rest], following.read(rest))
        texts |= zip(rest, chosen, strict=True)
    return [(sequence, texts[index]) for index, sequence in enumerate(sequences)]


def _sample_here(sequences: Sequence[SequenceState], logits: Float[Tensor, "batch vocab"]) -> list[str]:
    """Samples a token for each sequence from logits on the CPU, all at once; returns the texts that they completed."""
    texts, ready, rows, uniforms = dict[int, str](), list[int](), list[Tensor](), list[float]()
    for index, sequence in enumerate(sequences):
        try:  # a padded head has rows that are not tokens
            adjusted = sequence.adjust_logits(logits[index, : sequence.tokenizer.vocab_size])
            uniform = sequence.draw_uniform()
        except SEQUENCE_ERRORS as error:
            texts[index] = sequence.fail(error)
        else:
            ready.append(index)
            rows.append(adjusted)
            uniforms.append(uniform)
    tokens = sample_tokens(torch.stack(rows), [sequences[index].params for index in ready], uniforms) if ready else []
    for index, token in zip(ready, tokens, strict=True):
        texts[index] = _accept(sequences[index], token, logits[index])
    return [texts[index] for index in range(len(sequences))]


def _accept(sequence: SequenceState, token: int, logits: Tensor | None) -> str:
    try:
        return sequence.accept(token, logits)
    except SEQUENCE_ERRORS as error:
        return sequence.fail(error)


def _take_hypothesis(sequence: SequenceState, search: BeamSearch) -> str:
    """Returns the text that a sequence takes from its beam search, "" while that goes on."""
    if not search.is_done:
        return ""
    if not search.hypotheses:
        return sequence.fail(UsageError("the beam search found no text", "allow more tokens, or a wider constraint"))
    rank = min(sequence.beam_rank, len(search.hypotheses) - 1)  # a constraint may leave fewer texts than are asked for
    hypothesis, text = search.hypotheses[rank], ""
    for token in hypothesis.ids:
        if not sequence.finish_reason:
            text += sequence.append(token)
    return text + (sequence.finish(hypothesis.finish_reason) if not sequence.finish_reason else "")
