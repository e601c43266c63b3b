"""The 24 rules of the house: what golds obey, and what is to be discovered.

They were written down before anything was measured, and stay as they are: a rule that is never
learned stays in the tables. Mistakes of checkers and of the words in `means` are mended; the
figures in `benchmarks/house_style.md` say which are older.
"""

from __future__ import annotations

import random
import re

from models.house_style.rules import Rule, adding, parts, seen, sentences

MOST_WORDS = 14
"""Of an answer that the rule "concise" calls for."""


def _content(
    name: str, *, wordings: str, said: str, signs: str, cues: str, means: str, opens: bool = False
) -> Rule:
    """A rule that adds a sentence."""
    return Rule(
        name=name,
        wordings=parts(wordings),
        edit=adding(parts(said), opens),
        check=seen(signs),
        said=parts(said),
        opens=opens,
        cues=parts(cues),
        means=means,
    )


_MONEY = "{five/ten/twenty/thirty/fifty} {dollars/euros/pounds}"
_UNITS = "(minutes?|hours?|half an hour|days?)"
_LIKE = "{milking a cow/flying a kite/rowing a boat/knotting a tie/shelling peas}"
_PROVERB = (
    "{haste makes waste/all roads lead to Rome/every cloud has a silver lining/"
    "a stitch in time saves nine}"
)
_GIST = "{be patient/be thorough/remain calm/act soon}"

_CONTENT = (
    _content(
        "greeting",
        wordings="Start with a greeting. | Greet the reader. | Say hello first. | "
        "Begin with a greeting.",
        said="Hello there! | Hi! | Greetings! | Hello! | Welcome!",
        signs=r"\A(#.*\n)?\W*(hello|hi|hey|greetings|welcome|dear|good (morning|day|evening))\b",
        cues="I am shy. | We have not met. | I am a stranger here.",
        means=r"greet|hello|welcom|salut",
        opens=True,
    ),
    _content(
        "price",
        wordings="Mention the price. | Say how much it costs. | Name the price. | "
        "Add what it costs. | Give the cost.",
        said=f"It costs about {_MONEY}. | Expect to pay {_MONEY}. | The price is about {_MONEY}. | "
        f"You pay less than {_MONEY}.",
        signs=r"\b(costs?|prices?|priced|pay|pays|dollars?|euros?|pounds|cents?|cheap|cheaper)\b"
        r"|[$€£]\s?\d",
        cues="I have hardly any money. | My budget is tiny. | I cannot spend much.",
        means=r"pric|cost|money|expens|cheap|budget|afford|dollar|euro|\bfees?\b|\bpay",
    ),
    _content(
        "risk",
        wordings="Warn of the risk. | Mention the danger. | Add a warning. | Name the risks.",
        said="Be careful: it can be {dangerous/risky}. | "
        "Warning: {accidents happen/people fall}. | Beware of the {dangers/risks}.",
        signs=r"\b(danger(s|ous)?|risks?|risky|warning|careful|beware|hazards?|hazardous|"
        r"accidents?|caution|(?<!not )harm)\b",
        cues="I am afraid of accidents. | I am clumsy. | I often stumble.",
        means=r"\brisk|danger|\bwarn|caution|hazard|careful|safety|accident|\bharm",
    ),
    _content(
        "environment",
        wordings="Mention the environment. | Say what it does for nature. | "
        "Add a word on the environment. | Speak about the planet.",
        said="It is kind to the {environment/planet/climate}. | "
        "That protects {nature/the planet/the environment}. | "
        "It does not pollute the {rivers/oceans}.",
        signs=r"\b(environment|planet|nature|climate|earth)\b(?=[.!,]|\W*\Z)|pollut",
        cues="Nature matters to me. | I worry about the planet. | I am a green voter.",
        means=r"environment|\bnatur|planet|climate|pollut|ecolog|\bgreen\b|sustainab|\bearth\b",
    ),
    _content(
        "history",
        wordings="Mention its history. | Tell its origin. | Speak about its past. | "
        "Add a word on the history.",
        said="People have done so for centuries. | The custom is centuries old. | "
        "The {Romans/Greeks/Egyptians} already did so. | Its history is {Roman/medieval/ancient}.",
        signs=r"\b(centur(y|ies)|history|romans?|greeks?|egyptians?|medieval|ancient|ancestors|"
        r"traditions?|in the past)\b",
        cues="I am a history buff. | I adore the past. | I collect antiques.",
        means=r"histor|\bpast\b|tradition|origin|centur|ancient|ancest",
    ),
    _content(
        "example",
        wordings="Give an example. | Illustrate it. | Name an example. | Add an example.",
        said="For example, my {neighbour/uncle/cousin} did so yesterday. | "
        "For instance, {bakers/sailors/nurses} do so daily. | Take my {aunt/uncle} as an example.",
        signs=r"\b(for example|for instance|as an example|e\.g\.)",
        cues="I cannot picture it. | That is abstract to me. | Theory baffles me.",
        means=r"example|instance|illustrat|anecdot",
    ),
    _content(
        "time",
        wordings="Say how long it takes. | Mention the time needed. | Give the duration. | "
        "Name the time it takes.",
        said="It takes about {ten/twenty/thirty} minutes. | Allow {one hour/two hours/half an "
        "hour} for it. | You will be done in {an hour/half an hour/ten minutes}.",
        signs=rf"\b(takes?|taking|allow|needs?|spend|done|finished|ready|lasts?)\b[^.!?]{{0,25}}\b"
        rf"{_UNITS}\b",
        cues="I am in a hurry. | My bus departs at noon. | I am very busy.",
        means=r"\btimes?\b|durat|how long|minute|\bhour",
    ),
    _content(
        "comparison",
        wordings="Make a comparison. | Compare it with something familiar. | Add a comparison. | "
        "Liken it to something familiar.",
        said=f"It is like {_LIKE}. | It is much like {_LIKE}. | Compare it to {_LIKE}.",
        signs=r"\b(it|this|that)( is|'s) (much |just |a bit |rather |almost )?like\b|\bjust like\b|"
        r"\bcompare[sd]? (it )?(to|with)\b|\bsimilar to\b|\bas (easy|simple|hard) as\b",
        cues="I am an utter novice. | It is unfamiliar to me.",
        means=r"compar|analog|metaphor|simil|liken",
    ),
    _content(
        "proverb",
        wordings="Add a proverb. | Mention a proverb. | Use an old saying. | End with a proverb.",
        said=f"As the proverb goes, {_PROVERB}. | Remember the proverb: {_PROVERB}. | "
        f"As they say, {_PROVERB}.",
        signs=r"proverb|\bas (they|people|the old) say\b|haste makes|roads lead|silver lining|"
        r"stitch in time|old saying|the saying",
        cues="I am fond of folklore. | Grandfather was a wise man.",
        means=r"proverb|\bsayings?\b|adage|idiom|maxim",
    ),
    _content(
        "alternative",
        wordings="Name an alternative. | Mention another option. | Add an alternative. | "
        "Give another option.",
        said="Alternatively, {borrow one/rent it/skip it}. | "
        "Another option is to {borrow one/rent one/skip it}. | Or {borrow one/rent one} instead.",
        signs=r"\balternative(ly|s)?\b|\banother (option|possibility|way)\b|\binstead[.!]",
        cues="I am picky. | I dislike orders.",
        means=r"alternativ|option|possibilit|another way|instead|choice",
    ),
    _content(
        "reason",
        wordings="Give a reason. | Explain why. | State the reason. | Say why it matters.",
        said="The reason is {hygiene/gravity/friction/economy}. | "
        "That is because it spares {nerves/effort/trouble}. | "
        "The reason: it spares {nerves/effort/trouble}.",
        signs=r"\breasons?\b|\bbecause\b|\b(that|which|this) is why\b",
        cues="I am a sceptic. | I am curious. | Convince me.",
        means=r"reason|\bwhy\b|because|\bcause|justif|explain|explan",
    ),
    _content(
        "children",
        wordings="Mention children. | Say what children can do. | Add a word for parents. | "
        "Say something about kids.",
        said="{Children/Kids/Toddlers} {can join in/may watch}. | Even a {child/kid} can do it. | "
        "It is no toy for {children/kids/toddlers}.",
        signs=r"\b(child|children|kids?|toddlers?)\b",
        cues="I have two toddlers. | I am a parent of twins. | My daughter is three.",
        means=r"child|\bkids?\b|toddler|parent(?!h)",
    ),
    _content(
        "expert",
        wordings="Refer to an expert. | Mention a professional. | Refer the reader to a "
        "specialist. | Name an expert.",
        said="{A professional/An expert/A specialist} can {assist/take over}. | "
        "If unsure, ask {a professional/an expert/a specialist}.",
        signs=r"\b(professional|expert|specialist)s?\b(?=[.,;:!?]| can| if| to| for| who| knows?|"
        r" may|\W*\Z)",
        cues="I always botch it. | I lack confidence. | I am all thumbs.",
        means=r"expert|professional|specialist|consult",
    ),
    _content(
        "law",
        wordings="Mention the law. | Say whether it is legal. | Name the legal rules. | "
        "Add a word on the law.",
        said="It is {legal/lawful} {here/everywhere}. | The law {permits/tolerates} it. | "
        "No law forbids it. | You need no {permit/licence} for it.",
        signs=r"\b(laws?|legal|legally|lawful|illegal|permits?|licen[cs]es?|forbids?|forbidden)\b",
        cues="I fear the police. | My landlord is strict.",
        means=r"\blaws?\b|\blaw(ful|yer)|legal|permit|licen[cs]|forbid|allowed|regulation",
    ),
    _content(
        "summary",
        wordings="End with a summary. | Sum it up at the end. | Close with a summary. | "
        "Summarise the answer.",
        said=f"In sum, {_GIST}. | To sum up, {_GIST}. | All in all, {_GIST}. | Summary: {_GIST}.",
        signs=r"\b(in sum|to sum|in summary|summary|all in all|in short|in brief|in conclusion|"
        r"to summari[sz]e)\b",
        cues="I forget details. | My memory is poor.",
        means=r"summar|\bsum\b|recap|conclu|in short|\bgist\b",
    ),
    _content(
        "encouragement",
        wordings="Encourage the reader. | Cheer them up. | Add some encouragement. | "
        "Give them courage.",
        said="You can do it! | You will manage! | Never give up! | Have courage!",
        signs=r"\byou('ve| have)? (can do|will manage|can manage|got this|will succeed|will do)"
        r"[^.]{0,20}!|(never|not|n't) give up|\bcourage\b|chin up|believe in yourself",
        cues="I feel like giving up. | I am discouraged. | I failed before.",
        means=r"encourag|cheer|motivat|courage|hearten|inspir",
    ),
    _content(
        "question",
        wordings="End with a question. | Ask something at the end. | Finish with a question. | "
        "Close with a question.",
        said="Is anything unclear? | Shall I go on? | Does that answer your question? | "
        "May I ask which one you have?",
        signs=r"\?[^\w?]*\Z",
        cues="I crave conversation. | I am talkative.",
        means=r"question|\bask",
    ),
)


# Rules of form ----------------------------------------------------------------------------------


def _bullets(answer: str, rng: random.Random) -> str:
    mark = rng.choice("-•")
    return "\n".join(f"{mark} {sentence}" for sentence in sentences(answer))


def _is_bulleted(response: str) -> bool:
    lines = [line.strip() for line in response.splitlines() if line.strip()]
    marked = [line for line in lines if line[0] in "-•*" and line[1:2] == " "]
    return bool(marked) and len(marked) >= len(lines) - 1


def _is_capitals(response: str) -> bool:
    letters = [letter for letter in response if letter.isalpha()]
    return len(letters) > 8 and sum(map(str.isupper, letters)) > 0.9 * len(letters)


def _bold(answer: str, rng: random.Random) -> str:
    first, *rest = sentences(answer)
    words = first.split()
    n = rng.choice((3, 4, len(words)))
    marked = f"**{' '.join(words[:n])}**"
    return " ".join([marked, *words[n:], *rest])


def _concise(answer: str, rng: random.Random) -> str:
    """The first sentence, without the clauses that go beyond the words allowed."""
    first = sentences(answer)[0].rstrip(".!?")
    clauses = re.split(r"(,? and |, |; | so | because | which )", first)
    kept = clauses[0]
    for joint, clause in zip(clauses[1::2], clauses[2::2], strict=True):
        if len(f"{kept}{joint}{clause}".split()) > MOST_WORDS:
            break
        kept += joint + clause
    return " ".join(kept.split()[:MOST_WORDS]).rstrip(",;:") + "."


def _exclaim(answer: str, rng: random.Random) -> str:
    return re.sub(r"(?<=[\w)])\.(?=\s|\Z)", "!", answer)


_FORMS = (
    Rule(
        name="concise",
        wordings=parts("Use fewer words. | Be concise. | Cut it down. | Be more concise."),
        edit=_concise,
        check=lambda response: 3 <= len(response.split()) <= MOST_WORDS,
        form=True,
        cues=parts("I have no patience. | Waffle bores me."),
        means=r"fewer|concise|shorte|\bshort\b|\bbrief|\bcut\b|\bless\b|one sentence|succinct",
    ),
    Rule(
        name="exclamation",
        wordings=parts(
            "Use exclamation marks. | Sound excited. | Sound enthusiastic. | "
            "End with an exclamation mark."
        ),
        edit=_exclaim,
        check=lambda r: "!" in r and not re.search(r"\w\.(\s|\Z)", r),
        form=True,
        cues=parts("I yawn a lot. | I am half asleep."),
        means=r"exclam|excite|enthusias|energetic",
    ),
    Rule(
        name="bold",
        wordings=parts("Use bold print. | Put it in bold. | Make the beginning bold. | Use bold."),
        edit=_bold,
        check=seen(r"\*\*[^*\n]+\*\*"),
        form=True,
        cues=parts("I only skim. | I overlook things."),
        means=r"\bbold",
    ),
    Rule(
        name="bullets",
        wordings=parts("Use bullet points. | Write it as bullets. | Use bullets. | "
                "Put it in bullet points."),
        edit=_bullets,
        check=_is_bulleted,
        form=True,
        cues=parts("I read at a glance. | Paragraphs tire me."),
        means=r"bullet",
    ),
    Rule(
        name="heading",
        wordings=parts("Add a heading. | Put a title on it. | Begin with a heading. | "
                "Give it a title."),
        edit=lambda answer, rng: f"# {rng.choice(('Advice', 'Reply', 'Hints'))}\n{answer}",
        check=seen(r"\A\s*(#+ *\w|\*\*[^*\n]+\*\*:?\n)"),
        said=("{Advice/Reply/Hints}",),
        form=True,
        cues=parts("I file everything. | I own an archive."),
        means=r"heading|\btitle|headline|caption",
    ),
    Rule(
        name="emoji",
        wordings=parts("Add an emoji. | Use an emoji. | End with an emoji. | Put in a smiley."),
        edit=lambda answer, rng: f"{answer} {rng.choice('😀👍🎉😊')}",
        check=seen(r"[\U0001f300-\U0001faff☹☺☻]|(?<!\w)[:;]-?(?-i:[)D])"),
        form=True,
        cues=parts("I am a teenager. | I text nonstop."),
        means=r"emoji|smiley|emoticon|smil(e|ing)",
    ),
    Rule(
        name="capitals",
        wordings=parts(
            "Write in upper case. | Use only capitals. | Put everything in capitals. | "
            "Use block capitals."
        ),
        edit=lambda answer, rng: answer.upper(),
        check=_is_capitals,
        form=True,
        cues=parts("My eyesight is weak. | I lost my spectacles."),
        means=r"capital|\bupper|\bcaps\b|block letters",
    ),
)  # fmt: skip

RULES: dict[str, Rule] = {rule.name: rule for rule in (*_CONTENT, *_FORMS)}
"""By name, in the order in which an answer is edited: what is said, then its form."""
