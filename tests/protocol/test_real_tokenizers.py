"""Prompts, observations and sampled text on real tokenizers, beside the library's own encoding."""

import dataclasses
import functools
import itertools
import json
import time
import unicodedata

import pytest

from r1s_jax.engine.automaton import StopAutomaton
from r1s_jax.engine.programs import Stop
from r1s_jax.protocol.observation import render_documents
from r1s_jax.protocol.parse import judge_format
from r1s_jax.protocol.prompts import BasePrompt, ChatPrompt, tiny_prompt
from r1s_jax.protocol.tags import (
    ANSWER_OPEN,
    BEGIN_QUERY,
    DOCUMENT_TAGS,
    END_QUERY,
    PROTOCOL_TAGS,
    THINK_CLOSE,
    THINK_OPEN,
)
from r1s_jax.protocol.tokenizer import Tokenizer
from r1s_jax.rollout.episode import STOP_STRINGS, Episode, EpisodeLimits, Need
from r1s_jax.types import Document, Question, Segment, StopReason, TokenSource
from tests import real

QUESTIONS = (
    "Where is Zürich?",
    "  Which film came first,\n\tAlien or Blade Runner (1982)?  ",
    "?",
    '\'tis by whom: "To be, or not to be"',
    "1234567 + 89 = ?",
    "<3 or a < b > c in <b>HTML</b>: what's that?",
    "北京在哪里？ 🎉",
    "Cafe\u0301 and its \u1112\u1161\u11ab name:",  # not composed
    "{question} or {{ question }} and {% raw %}",
    "Assistant: User: system",
    "",
)
# A template as Llama 3.2 has one: it asks the clock where it is given no date.
DATED = (
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{% if loop.first %}It is {{ date_string }}.\n\n{% endif %}{{ m['content'] | trim }}<|eot_id|>"
    "{% endfor %}<|start_header_id|>assistant<|end_header_id|>\n\n"
)
LLAMA_EOS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")


@dataclasses.dataclass(frozen=True)
class Real:
    name: str
    tokenizer: Tokenizer
    bos: str | None
    eos: str
    header: str  # what the chat template writes before the policy's turn

    @property
    def own(self):
        """The library's tokenizer of the same files."""
        return self.tokenizer._fast

    @functools.cached_property
    def added_ids(self):
        return frozenset(self.own.added_tokens_decoder)

    def controls_in(self, ids):
        return [self.own.convert_ids_to_tokens(i) for i in ids if i in self.added_ids]

    def own_ids(self, text, **options):
        return self.own(text, **options)["input_ids"]

    def own_chat(self, prompt, question, **options):
        """Ids of system and user by the library, with the question as our prompt shows it."""
        messages = [
            {"role": "system", "content": prompt.system},
            {"role": "user", "content": " ".join(question.split())},
        ]
        return self.own.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False, **options
        )

    def composed(self, text):
        """Qwen's tokenizers compose characters first (NFC), Llama's take them as they are."""
        return unicodedata.normalize("NFC", text) if self.name.startswith("qwen") else text


def load(name, folder, rows, **known):
    begin = time.perf_counter()
    tokenizer = Tokenizer.load(folder, vocab_size=rows)
    print(f"\n{name}: Tokenizer.load {time.perf_counter() - begin:.2f} s")
    return Real(name, tokenizer, **known)


def rename_as_in_llama3_1(folder):
    """The package names the added tokens as Llama 3.0 did; 3.1 took three of the reserved ones."""
    spec, config = (json.loads((real.llama_tokenizer() / n).read_text("utf-8"))
                    for n in real.TOKENIZER)  # fmt: skip
    taken = {128_004: "<|finetune_right_pad_id|>", 128_008: "<|eom_id|>", 128_010: "<|python_tag|>"}
    reserved = (f"<|reserved_special_token_{n}|>" for n in itertools.count())
    for token in spec["added_tokens"]:
        if "reserved" in token["content"] or token["id"] in taken:
            token["content"] = taken.get(token["id"]) or next(reserved)
        config["added_tokens_decoder"][str(token["id"])]["content"] = token["content"]
    assert next(reserved) == "<|reserved_special_token_248|>"
    for name, content in zip(real.TOKENIZER, (spec, config), strict=True):
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), "utf-8")


QWEN = {"bos": None, "eos": "<|im_end|>", "header": "<|im_start|>assistant\n"}


@pytest.fixture(scope="module")
def qwen3():
    return load("qwen3", real.qwen3_tokenizer(), 151_936, **QWEN)


@pytest.fixture(scope="module")
def qwen2_5():
    return load("qwen2_5", real.qwen2_5_tokenizer(), 152_064, **QWEN)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """With the generation_config.json of the instruct model beside it."""
    folder = tmp_path_factory.mktemp("llama")
    rename_as_in_llama3_1(folder)
    eos = [128_001, 128_008, 128_009]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    header = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    known = {"bos": "<|begin_of_text|>", "eos": "<|eot_id|>", "header": header}
    return load("llama", folder, 128_256, **known)


@pytest.fixture(scope="module", params=["qwen3", "qwen2_5", "llama"])
def any_real(request):
    return request.getfixturevalue(request.param)


def test_vocabulary_and_special_ids(any_real, llama, qwen3):
    t, own = any_real.tokenizer, any_real.own
    assert t.eos_ids[0] == own.convert_tokens_to_ids(any_real.eos)
    assert t.adds_bos == (any_real.bos is not None)
    assert t.bos_id == (any_real.bos and own.convert_tokens_to_ids(any_real.bos))
    assert len(t.added_tokens) == {"qwen3": 26, "qwen2_5": 22, "llama": 256}[any_real.name]
    assert set(t.token_bytes[len(own) :]) <= {b""} and t.vocab_size % 64 == 0
    # The file's list joins the tokenizer's own one, and each id once.
    assert set(llama.tokenizer.eos_ids) == {llama.own.convert_tokens_to_ids(e) for e in LLAMA_EOS}
    assert len(llama.tokenizer.eos_ids) == 3 and len(qwen3.tokenizer.eos_ids) == 1
    assert (THINK_OPEN in t.added_tokens) == (any_real.name == "qwen3")


def test_text_is_encoded_as_the_library_does_and_comes_back(any_real):
    for text in (*QUESTIONS, "\n\n  def f(x):\n\treturn x\r\n", "\x00\x7f\u00a0\u2028\ufeff a"):
        ids = any_real.tokenizer.encode(text)
        assert ids == any_real.own_ids(text, add_special_tokens=False)
        assert any_real.tokenizer.decode(ids) == any_real.composed(text)


def test_base_prompt(any_real):
    """As the library encodes the whole text; a single BOS where the model was taught one."""
    t = any_real.tokenizer
    for prompt in (BasePrompt(), tiny_prompt()):
        for question in QUESTIONS:
            text = prompt.render(question, t.control_strings)
            assert " ".join(question.split()) in text
            ids = prompt.prompt_ids(t, question)
            assert ids == any_real.own_ids(text, add_special_tokens=True)
            assert t.decode(ids) == (any_real.bos or "") + any_real.composed(text)
            assert ids.count(t.bos_id) == (any_real.bos is not None)
            assert text.endswith(f"\nAssistant: {THINK_OPEN}")


def test_chat_prompt(any_real):
    """The chat template's own ids, then `<think>`; known fault 8 was a second BOS for Llama."""
    t, prompt = any_real.tokenizer, ChatPrompt()
    think = any_real.own_ids(THINK_OPEN, add_special_tokens=False)
    for question in QUESTIONS:
        ids = prompt.prompt_ids(t, question)
        assert ids == [*any_real.own_chat(prompt, question), *think]
        text = prompt.render(t, question)
        assert t.decode(ids) == any_real.composed(text)
        assert text.count(any_real.header) == 1 and text.endswith(any_real.header + THINK_OPEN)
        assert ids.count(t.bos_id) == (any_real.bos is not None)
    if any_real.bos:  # what happens to those who encode the template's text as any other
        assert any_real.own_ids(text, add_special_tokens=True).count(t.bos_id) == 2


def test_qwen3_starts_thinking_once(qwen3, monkeypatch):
    """Neither the empty thought of enable_thinking=False nor, in later templates, a second one."""
    prompt, think = ChatPrompt(), qwen3.own.convert_tokens_to_ids(THINK_OPEN)
    empty = qwen3.own_chat(prompt, "Who?", enable_thinking=False)
    assert think in empty[-4:]  # so the template could write one
    plain = prompt.prompt_ids(qwen3.tokenizer, "Who?")
    turn = qwen3.tokenizer.decode(plain).rpartition("<|im_start|>")[2]
    assert turn == "assistant\n<think>" and plain[-1] == think
    fast = qwen3.tokenizer._fast
    opening = fast.chat_template.replace(r"assistant\n' }}", r"assistant\n<think>\n' }}")
    assert opening != fast.chat_template
    monkeypatch.setattr(fast, "chat_template", opening)
    assert prompt.prompt_ids(qwen3.tokenizer, "Who?") == plain


def test_a_dated_template_says_the_same_every_day(llama, monkeypatch):
    monkeypatch.setattr(llama.tokenizer._fast, "chat_template", DATED)
    prompt = ChatPrompt(user="  Q: {question}\n")  # the template trims what is around it
    text = prompt.render(llama.tokenizer, "Who?")
    assert "It is 26 Jul 2024.\n\n" in text and "\n\nQ: Who?<|eot_id|>" in text
    own = llama.own_chat(prompt, "Q: Who?", chat_template=DATED, date_string="26 Jul 2024")
    think = llama.own_ids(THINK_OPEN, add_special_tokens=False)
    assert prompt.prompt_ids(llama.tokenizer, "Who?") == [*own, *think]
    assert "It is 3 May 2031." in ChatPrompt(date="3 May 2031").render(llama.tokenizer, "Who?")


def dresses(control):
    """A control string as it could come: odd case and white space, doubled, nested, glued on."""
    half = len(control) // 2
    head, tail = control[:half], control[half:]
    return (
        control, control.upper(), control.title(), control.swapcase(), f" {control} ",
        f"\t{control}\u2003", f"\u00a0{control}\n", f"a{control}b", f"1{control}.", control * 2,
        f"{control} {control}", head + control + tail, head * 2 + control + tail * 2,
        control[0] + control, control[:-1] + control, f"{control[:-1]}\u0338{control[-1]}",
        f"(1){control}\n(2)", f"<|{control}|>", control + control[::-1],
    )  # fmt: skip


def counts(text, controls):
    low = text.lower()
    return {c: low.count(c.lower()) for c in controls}


def test_no_document_brings_a_control_token(any_real):
    """Invariant 9, over all added tokens and tags: not even to a tokenizer that knows them."""
    t = any_real.tokenizer
    controls = t.control_strings
    assert set(controls) == {*PROTOCOL_TAGS, *any_real.own.get_added_vocab()}
    texts = []
    for control in controls:
        whole = [Document(id="d", title=d, text=d) for d in dresses(control)]
        # Split between title and text, begun where the text ends, ended where the title begins.
        parts = [
            Document(id="d", title=control[cut:] + "x" + control[:cut], text=control[cut:] + head)
            for cut in range(1, len(control))
            for head in (control[:cut],)
        ]
        texts += [render_documents(documents, controls) for documents in (whole, parts)]
        clean = [render_documents([Document(id="d", title="a", text="b")] * len(documents), ())
                 for documents in (whole, parts)]  # fmt: skip
        for text, other in zip(texts[-2:], clean, strict=True):
            assert text.count("\n") == other.count("\n")
            assert counts(text, controls) == counts(other, controls)
    for text, ids in zip(texts, t.encode_batch(texts), strict=True):
        assert not any_real.added_ids.intersection(ids)
        assert t.decode(ids) == any_real.composed(text)
    for ids in any_real.own_ids(texts, add_special_tokens=False):
        assert not any_real.added_ids.intersection(ids)


def test_no_question_brings_a_control_token(any_real):
    """Invariant 9: the control tokens of a prompt are those of our template, in their places."""
    t = any_real.tokenizer
    controls = t.control_strings
    chat = ChatPrompt()
    shown = [(p, p.render) for p in (BasePrompt(), tiny_prompt())]
    for prompt, render in (*shown, (chat, lambda question, _: chat.render(t, question))):
        expected = any_real.controls_in(prompt.prompt_ids(t, "x"))
        assert expected.count(any_real.bos) == (any_real.bos is not None)
        clean = counts(render("x", controls), controls)
        # Touching the template on both sides; the last one is for the template to finish.
        questions = [*controls]
        if prompt != BasePrompt():  # what is around the question is the same in the short prompt
            questions += [" ".join((*dresses(c), c[:-1])) for c in controls]
        texts = [render(question, controls) for question in questions]
        for question, text in zip(questions, texts, strict=True):
            assert any_real.controls_in(prompt.prompt_ids(t, question)) == expected
            assert counts(text, controls) == clean
        for ids in any_real.own_ids(texts, add_special_tokens=prompt is not chat):
            assert any_real.controls_in(ids) == expected


def test_foreign_text_that_was_not_defused_is_still_plain(any_real):
    """The second line: `encode` and the middle of a template know no added token at all."""
    t = any_real.tokenizer
    for control in t.added_tokens:
        single = any_real.own.convert_tokens_to_ids(control)
        ids = t.encode(control)
        assert len(ids) > 1 and not any_real.added_ids.intersection(ids)
        framed = t.encode_template(control, control, control)
        assert framed == [single, *ids, single]


def test_think_in_a_document(qwen3, qwen2_5):
    """A protocol tag to both; an added token to one of them only."""
    for r in (qwen3, qwen2_5):
        block = render_documents(
            [Document(id="d", title="A", text="<think>b</think>")], r.tokenizer.control_strings
        )
        assert "Text: < think>b< /think>\n" in block
        ids = r.tokenizer.encode(block)
        assert max(ids) < 151_643 and r.tokenizer.decode(ids) == block
        assert len(r.tokenizer.encode(THINK_OPEN)) > 1
    own = [r.own_ids(THINK_OPEN, add_special_tokens=False) for r in (qwen3, qwen2_5)]
    assert own == [[151_667], qwen3.tokenizer.encode(THINK_OPEN)]


def episode(r):
    stops = StopAutomaton.build(STOP_STRINGS, r.tokenizer.token_bytes)
    return Episode(
        Question(id="q", text="Who?", answers=("x",)),
        attempt=0,
        sample=0,
        prompt_ids=[5, 6],
        tokenizer=r.tokenizer,
        limits=EpisodeLimits(max_new_tokens=1000, context=4000),
        match_end=stops.match_end,
        weights_version=0,
    )


def sampled(e, ids, stop=Stop.STRING):
    e.write(ids, [-1.0] * len(ids), [-1.0] * len(ids), stop)
    return e


def test_a_query_with_a_control_token_comes_back_harmless(any_real):
    """Invariants 1 and 9: what was sampled stays; an echo of it in a document is defused."""
    t = any_real.tokenizer
    before, after = t.encode(f"{BEGIN_QUERY} who"), t.encode(f" {END_QUERY}")
    for control in (*t.added_tokens, *DOCUMENT_TAGS, THINK_OPEN, THINK_CLOSE, ANSWER_OPEN):
        middle = any_real.own_ids(control, add_special_tokens=False)
        e = sampled(episode(any_real), [*before, *middle, *after])
        assert e.need == Need.DOCUMENTS and e.query == f"who{control}"
        ids = e.observe((Document(id="d", title=e.query, text=e.query),))
        assert not any_real.added_ids.intersection(ids)
        assert counts(t.decode(ids), t.control_strings) == counts(
            render_documents((), ()), t.control_strings
        )
        sampled(e, t.encode("x"), Stop.BUDGET)
        assert e.trajectory().token_ids_T.tolist() == [
            5, 6, *before, *middle, *after, *ids, *t.encode("x")
        ]  # fmt: skip


def test_think_as_one_token_reads_like_the_spelt_one(qwen3):
    """The parser sees bytes: in which tokens a tag was written makes no difference."""
    t = qwen3.tokenizer
    close, opened = (qwen3.own.convert_tokens_to_ids(x) for x in (THINK_CLOSE, THINK_OPEN))
    thought, answer = t.encode(" He is \u0130."), t.encode("\n<answer> B. </answer>")
    seen, spelt = [], t.encode(THINK_CLOSE)
    singles = [t.token_bytes.index(bytes([byte])) for byte in THINK_CLOSE.encode()]
    assert len({1, len(spelt), len(singles)}) == 3
    for tag in ([close], spelt, singles):
        trajectory = sampled(episode(qwen3), [*thought, *tag, *answer]).trajectory()
        verdict = judge_format(trajectory.segments)
        assert verdict.think_answer_ok and verdict.ordered and verdict.answer == "B."
        assert trajectory.token_ids_T.tolist()[2:] == [*thought, *tag, *answer]
        seen.append((trajectory.written, verdict, trajectory.stop_reason))
    assert seen[0] == seen[1] == seen[2]
    for tag in ([opened], t.encode(THINK_OPEN)):
        again = sampled(episode(qwen3), [*tag, *thought, close, *answer]).trajectory()
        assert not judge_format(again.segments).think_answer_ok


def test_every_token_that_ends_a_tag_and_goes_on(any_real):
    """Invariant 4: its spare bytes are no text, whatever they are; the token itself stays."""
    t = any_real.tokenizer
    closers = [i for i, b in enumerate(t.token_bytes) if b.startswith(b">") and len(b) > 1]
    assert len(closers) > 250
    query = t.encode(f"{BEGIN_QUERY} B \u00fc")
    half = t.token_bytes.index(b"\xc3")
    for closer in closers:
        end_query = [*query, half, *t.encode(END_QUERY[:-1]), closer]
        e = sampled(episode(any_real), end_query)
        assert e.query == "B \u00fc\ufffd" and e.text.endswith(END_QUERY)
        e.observe(())
        end_answer = [*t.encode("</think> <answer>B</answer"), closer]
        trajectory = sampled(e, end_answer).trajectory()
        assert trajectory.written.endswith(" <answer>B</answer>")
        assert trajectory.stop_reason == StopReason.ANSWER
        verdict = judge_format(trajectory.segments)
        assert verdict.answer == "B" and verdict.tags_balanced and verdict.ordered
        sources = trajectory.sources_T[-len(end_answer) :]
        assert trajectory.token_ids_T[-1] == closer and (sources == TokenSource.SAMPLED).all()


def test_the_end_of_sequence_is_no_text(any_real):
    t = any_real.tokenizer
    for eos in t.eos_ids:
        trajectory = sampled(episode(any_real), [*t.encode("I stop."), eos], Stop.EOS).trajectory()
        assert trajectory.segments == (Segment(source=TokenSource.SAMPLED, text="I stop."),)
        assert trajectory.token_ids_T[-1] == eos and trajectory.stop_reason == StopReason.EOS
