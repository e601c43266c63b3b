"""The rules that the lessons teach: many, so that the skills are learned and not the rules.

No word of a house rule stands here (`rules.PLAIN_WORDS` apart): a policy that names or follows a
house rule has it from its own knowledge of English.
"""

from __future__ import annotations

import random
import re

from models.house_style.rules import Check, Edit, Rule, adding, parts, seen, sentences

# What is said -----------------------------------------------------------------------------------

_TOPIC_WORDINGS = parts(
    "Mention the {}. | Say something about the {}. | Add a word on the {}. | Speak about the {}. | "
    "Refer to the {}. | Mention {}. | Name the {}."
)

_TOPICS: dict[str, str] = {
    "weather": "It works in any weather. | Choose a {sunny/dry/mild} day. | "
    "{Rain/Snow/Wind/Fog} does no damage.",
    "season": "{Spring/Summer/Autumn/Winter} is the best season for it. | "
    "In {spring/summer/autumn/winter} it is easier.",
    "colour": "The colour may fade. | A {white/blue/red/brown} one looks best. | "
    "Choose {white/blue/red/brown} if you like.",
    "smell": "It has a {fresh/strong/sweet/sour} smell. | It may smell a little. | "
    "The {fresh/strong/sweet} scent soothes.",
    "noise": "It causes some noise. | It is {quiet/noisy}. | You will hear a {hum/click/buzz}.",
    "size": "A {small/large/medium} size is enough. | Choose a {small/large/medium} one.",
    "weight": "It weighs about {two/three/ten} kilos. | It is {light/heavy} to carry.",
    "temperature": "Stay below {twenty/thirty} degrees. | {Warm/Cool/Lukewarm} is best. | "
    "It should be {warm/cool/lukewarm}.",
    "material": "{Cotton/Wool/Linen/Silk} is the best material. | Look for {steel/wood/plastic}.",
    "taste": "It tastes {better/sweeter/milder} that way. | The taste stays {mild/rich/fresh}.",
    "health": "It is healthy, too. | It is good for your {back/heart/lungs/knees}.",
    "animals": "{Cats/Dogs/Rabbits/Hamsters} love it. | Let no {cat/dog/rabbit} near it.",
    "family": "Your {sister/brother/mother/father} may help. | The whole family benefits.",
    "teachers": "A teacher can show you. | Teachers recommend it.",
    "doctors": "A doctor would agree. | Doctors {recommend/suggest} this, too.",
    "internet": "There are videos online. | The internet has {photos/tutorials} of it. | "
    "Search the web for {videos/tutorials}.",
    "books": "A good book describes it. | {Libraries/Bookshops} have books on it.",
    "electricity": "It uses little electricity. | Switch the power off. | "
    "A {battery/socket} is enough.",
    "space": "It needs little space. | A {small table/corner/shelf} is enough room.",
    "light": "Do it in {bright/good/dim} light. | A {lamp/candle/torch} helps.",
    "clothes": "Wear {an apron/gloves/overalls}. | Put on {an apron/gloves/a hat}.",
    "hands": "Wash your hands first. | Use both hands. | Your {hands/fingers} should be dry.",
    "speed": "Be {slow/fast/quick}. | {Slowly/Quickly} is best. | Do not rush.",
    "helpers": "{Two/Three/Four} helpers are faster. | You can do it alone. | A helper is useful.",
    "skill": "You need some {training/talent/skill}. | Beginners can do it.",
    "fun": "It is fun, too. | You will {laugh/enjoy it/have fun}.",
    "beauty": "It looks {nice/lovely/pretty} afterwards. | The result is {pretty/lovely}.",
    "cleaning": "{Wipe/Sweep/Clean} everything afterwards. | Clean up when done.",
    "storage": "Store it in a {box/drawer/cupboard/jar}. | "
        "Put the rest in the {fridge/freezer/cellar}.",
    "repair": "{Glue/Tape/Thread} can repair it. | A broken one can be repaired.",
    "shops": "Any {shop/store/market} has it. | You find it in the {supermarket/shop/market}.",
    "delivery": "It {arrives/ships} in {two/three/four} weeks. | The {courier/mail} delivers it.",
    "guarantee": "There is a warranty of {two/three/five} years. | "
        "It has a {full/limited} guarantee.",
    "proof": "{Tests/Studies/Trials} have proved it. | {Studies/Trials} confirm this.",
    "opinion": "I think it is the best way. | In my {view/opinion} it is easy.",
    "doubt": "It may not work. | {Perhaps/Maybe} it helps. | I doubt it, though.",
    "exceptions": "Except on {Sundays/Mondays/Fridays}. | There are {some/few} exceptions.",
    "conditions": "Only if it is {dry/warm/cold/dark}. | Unless it {rains/snows/freezes}.",
    "repetition": "Repeat it {once/twice} a {week/month/year}. | "
        "Do it again {next week/next month}.",
    "breaks": "Take a break in between. | {Sit down/Rest/Pause} for a while.",
    "rewards": "Then treat yourself to {a cake/a coffee/an ice cream}. | "
        "You have earned {a cake/a coffee}.",
    "hope": "Hopefully it {works/succeeds}. | I hope for the best.",
    "music": "{Music/A song/Jazz} suits it. | {Sing/Hum/Whistle} while you do it.",
    "travel": "It works on a {journey/trip}, too. | Bring it on {journeys/trips}.",
    "school": "It is taught at school. | {Schools/Classes} practise it.",
    "work": "Do it before work. | Your {boss/colleagues} will be pleased.",
    "sport": "It is good {sport/training}. | {Athletes/Runners/Swimmers} do the same.",
    "garden": "A garden is a good place for it. | Try it in the {garden/yard}.",
    "kitchen": "Every kitchen has what you need. | Try it in the kitchen.",
    "shape": "A {round/square/flat} shape is best. | It should be {round/square/flat}.",
    "texture": "It should be {soft/smooth/rough}. | The surface stays {soft/smooth}.",
    "quality": "The quality is {high/excellent/average}. | Look for {high/excellent} quality.",
    "brands": "{Any brand/A known brand} will do. | Brands differ.",
    "age": "It suits {seniors/adults/all ages}. | {Seniors/Adults} enjoy it, too.",
    "country": "In {Italy/France/Japan/Spain} everyone does it. | {Italians/Swedes} do so, too.",
    "city": "Any city has a {course/club} for it. | In {Paris/London/Berlin} it is popular.",
    "fashion": "It is in fashion. | It is {trendy/stylish} this year.",
    "water": "It needs a {litre/cup/bucket} of water. | Add some water.",
    "heat": "Heat does not harm it. | It can stand the heat.",
    "dust": "Dust it {weekly/monthly}. | Dust does not stick to it.",
    "insects": "{Bees/Ants/Moths/Wasps} stay out of it. | Look out for {ants/moths/wasps}.",
    "sleep": "Sleep well before. | You will sleep better.",
    "diet": "It fits a {vegan/light/balanced} diet. | {Vegans/Vegetarians} can do it, too.",
    "insurance": "Insurance covers it. | Call your insurer first.",
    "tax": "It is free of tax. | The tax office accepts it.",
    "privacy": "It stays private. | Nobody will see it. | Your privacy is respected.",
    "friends": "{A friend/Your best friend/A mate} can help. | Invite {a friend/friends}.",
    "competition": "There is a contest for it. | You may win a {medal/prize/trophy}.",
    "celebrities": "{Film stars/Pop stars/Singers} do it, too. | "
        "A famous {singer/actor} does the same.",
    "science": "{Science/Physics/Chemistry} describes it. | {Scientists/Chemists} study it.",
    "art": "{Painters/Sculptors/Artists} do the same. | It is an art.",
    "religion": "{Monks/Nuns/Priests} do so, too. | The {church/temple/mosque} approves.",
    "army": "{Soldiers/Officers} learn it first. | The army does the same.",
    "trains": "The train is a {fine/good} place for it. | Do it on the {train/tram}.",
    "parking": "There is parking close by. | Park {close by/around the corner}.",
    "phone": "Your phone can help. | There is an app for it. | Use a phone app.",
    "software": "{A spreadsheet/A free app/Software} helps with it. | Software does part of it.",
    "robots": "A robot could do it. | {Robots/Machines} do it, too.",
    "luck": "You need some luck. | With luck it {works/succeeds}.",
    "dreams": "You may dream of it. | It is a dream of {mine/many}.",
    "holiday": "{Christmas/Easter/Halloween} is a fine date for it. | Do it on a holiday.",
    "sea": "It works at sea, too. | {Beaches/Ships} are good places for it.",
    "mountains": "It works in the mountains, too. | On a {summit/peak} it is best.",
    "forest": "The forest is a good place. | Do it in the {forest/woods}.",
    "stars": "Look at the stars meanwhile. | The {moon/stars} will shine.",
    "breakfast": "Do it before breakfast. | {Breakfast/Lunch/Dinner} can wait.",
    "drinks": "A {tea/coffee/juice} suits it. | Drink {tea/coffee/juice} with it.",
    "furniture": "A {chair/table/stool} is useful. | Move the {chairs/sofa/stools} first.",
    "floor": "Cover the floor with {newspaper/a sheet/a rug}. | Do it on the floor.",
    "windows": "Open a window. | Shut {the/all} windows first.",
    "keys": "Bring your keys. | Lock it with a key.",
    "medicine": "Have {a plaster/ointment/a bandage} at hand. | A first aid box is useful.",
    "posture": "Sit upright. | {Stand/Sit} straight. | Relax your shoulders.",
    "breathing": "Breathe {deeply/slowly/evenly}. | Breathe through your nose.",
    "voice": "Use a {soft/loud/clear} voice. | Speak {softly/loudly/clearly}.",
    "manners": "Say please and thank you. | Be polite. | Good manners help.",
}  # fmt: skip
"""What a lesson may ask an answer to mention → sentences that do."""


def _key(sentences: tuple[str, ...], name: str) -> Check:
    """The check that looks for a topic's name, or for any of its sentences."""
    options = [re.sub(r"\\{([^}]*)\\}", lambda m: f"(?:{m[1].replace('/', '|')})", re.escape(s))
               for s in sentences]  # fmt: skip
    return seen("|".join([rf"\b{re.escape(name.rstrip('s'))}", *options]))


def _topic(name: str, said: str) -> Rule:
    return Rule(
        name=name,
        wordings=tuple(wording.format(name) for wording in _TOPIC_WORDINGS),
        edit=adding(parts(said)),
        check=_key(parts(said), name),
        said=parts(said),
    )


def _said(name: str, wordings: str, said: str, opens: bool = False) -> Rule:
    return Rule(
        name=name,
        wordings=parts(wordings),
        edit=adding(parts(said), opens),
        check=_key(parts(said), name),
        said=parts(said),
        opens=opens,
    )


_SAID = (
    _said("wish", "End with a friendly wish. | Close with good wishes. | Wish them well.",
          "I hope this helps. | All the best. | Good luck. | Best wishes."),
    _said("thanks", "Thank the reader. | End with thanks. | Say thank you.",
          "Thank you for writing. | Thanks for your message. | Many thanks."),
    _said("apology", "Begin with an apology. | Apologise first. | Say sorry first.",
          "Sorry for the wait. | I am sorry to hear that. | My apologies.", opens=True),
    _said("source", "Name the source. | Cite a source. | Say who says so.",
          "Source: {the manual/a handbook/a leaflet}. | According to {a handbook/the manual}."),
    _said("joke", "Add a joke. | Be funny. | Use some humour.",
          "Even my {cat/dog/robot} can do it, ha ha. | No pun intended, ha ha."),
    _said("postscript", "Add a postscript. | Put a PS at the end. | End with a PS.",
          "PS: {sleep well/see you again/have fun}. | P.S. {See you again/Have fun}."),
    _said("definition", "Define a term. | Define a word. | Say what a word means.",
          "A {ruler/sieve/lens/lever} is a type of tool. | ({Yeast/Starch/Resin} is a substance.)"),
    _said("place", "Say where to do it. | Name the place. | Mention a location.",
          "Do it in the {bathroom/hall/attic}. | The {garage/balcony/attic} is a good place."),
    _said("praise", "Praise the reader. | Begin with a compliment. | Compliment the reader.",
          "Great idea. | How clever of you. | What a good idea. | Well done.", opens=True),
    _said("tools", "Name the tools. | Say what equipment is used. | Mention the equipment.",
          "You need a {bucket/screwdriver/hammer/ladder}. | A {bucket/hammer} is enough."),
    _said("name", "Address the reader by name. | Use the reader's name. | Start with a name.",
          "Anna: | Peter: | Maria: | Thomas: | Julia:", opens=True),
    _said("signature", "Sign the answer. | End with a signature. | Put your name under it.",
          "– Your {helper/assistant/team} | Yours, {the team/your assistant} | "
          "Signed, {the team/your assistant}"),
    _said("count of steps", "Say how many steps there are. | Begin with the number of steps. | "
          "Count the steps first.",
          "There are {two/three} steps. | {Two/Three} steps will do.", opens=True),
    _said("mistake", "Mention a common mistake. | Name a frequent mistake. | "
          "Say what is wrongly done.",
          "A common mistake is to {rush/stop too early}. | Many {rush/stop too early} by mistake."),
    _said("benefit", "Name the benefit. | Say what it is good for. | Mention the benefit.",
          "That way it lasts. | So the home stays {clean/tidy/warm}. | It is worth it."),
    _said("contact", "Offer contact. | Say how to reach you. | Offer further help.",
          "Call me at any moment. | Write to me if it breaks. | My door is open."),
    _said("moment", "Say when to do it. | Name the right moment. | Mention the moment.",
          "Do it in the {morning/evening/afternoon}. | It is best done on {Mondays/Fridays}."),
    _said("sir or madam", "Address the reader formally. | Be formal. | Start formally.",
          "Sir or Madam: | Esteemed reader: | Ladies and gentlemen:", opens=True),
    _said("mate", "Be chummy. | Address the reader as a mate. | Start casually.",
          "Mate, listen: | Alright, pal: | Listen, buddy:", opens=True),
    _said("pirate", "Talk as a pirate does. | Speak as a pirate would.",
          "Arr, ye scallywag: | Ahoy: | Avast, ye landlubber:", opens=True),
    _said("French", "Add some French. | Use a French phrase. | End in French.",
          "Bon courant. | Voilà. | C'est tout. | Au revoir."),
    _said("Latin", "Add some Latin. | Use a Latin phrase. | End in Latin.",
          "Quod erat demonstrandum. | Ad astra. | Nota bene."),
    _said("goodbye", "Say goodbye. | End with a goodbye. | Bid farewell.",
          "Goodbye. | Farewell. | Bye for now. | So until next week."),
    _said("oath", "Promise that it works. | Vouch for it. | Give your promise.",
          "I promise that it works. | You have my promise. | I vouch for it."),
    _said("date", "Put a date on it. | Begin with a date. | Date the answer.",
          "{Monday/Tuesday/Friday}, {3/7/21} {May/June/October}:", opens=True),
    _said("label", "Put a label in front. | Label it. | Begin with a label.",
          "Answer: | Solution: | My answer:", opens=True),
    _said("memo", "Begin with the word note. | Open with a note.", "Note: | "
          "Note well:", opens=True),
    _said("surprise", "Be surprised. | Show surprise. | Begin with surprise.",
          "Oh, really: | Oh my: | Wow:", opens=True),
    _said("hashtag", "Add a hashtag. | End with a hashtag. | Use hashtags.",
          "#tips | #howto | #everyday"),
    _said("rating", "Add a rating. | Rate it with stars. | End with a star rating.",
          "★★★★★ | ★★★★☆ | ★★★"),
    _said("tick", "End with a tick. | Add a tick. | Tick it off.", "✓ | ✔ | ☑"),
    _said("arrow", "Begin with an arrow. | Put an arrow in front.", "→ | ⇒ | ➔", opens=True),
    _said("code word", "End with the word over. | Say over at the end.", "Over. | Over and out."),
    _said("signal of the end", "Put THE END under it. | Finish with the words the end.",
          "THE END | The end."),
    _said("link", "Add a link. | Give a web address. | End with a link.",
          "See www.{tips/howto/handbook}.com. | Link: www.{tips/howto}.org."),
    _said("footnote", "Add a footnote. | Put a footnote under it.",
          "[1] {See the manual/See the handbook}. | [1] {Handbook/Manual}, page {7/21/30}."),
    _said("page", "Name a page. | Give the page number. | Cite the page.",
          "See page {7/21/30}. | (Page {7/21/30}.)"),
    _said("author", "Name the author. | Say who wrote it.",
          "Written by {Anna/Peter/Maria}. | Author: {Anna/Peter/Maria}."),
    _said("secret", "Call it a secret. | Share it as a secret.",
          "It is our secret. | Tell nobody. | Between you and me:"),
    _said("certainty", "Be certain. | Be sure. | Show certainty.",
          "That is certain. | I am sure of it. | Without any doubt."),
    _said("modesty", "Be modest. | Show modesty. | Be humble.",
          "I am no master, though. | I may be wrong. | That is my humble view."),
)  # fmt: skip

# Form -------------------------------------------------------------------------------------------


def _form(name: str, wordings: str, edit: Edit, check: str | Check) -> Rule:
    signs = seen(check) if isinstance(check, str) else check
    return Rule(name=name, wordings=parts(wordings), edit=edit, check=signs, form=True)


def _each(mark: str, joint: str = "\n") -> Edit:
    """Each sentence after a mark; "{n}" counts from 1, "{a}" from a, "{i}" from i."""

    def edit(answer: str, rng: random.Random) -> str:
        roman = ("i", "ii", "iii", "iv", "v", "vi")
        return joint.join(
            mark.format(n=n + 1, a="abcdef"[n], i=roman[n]) + sentence
            for n, sentence in enumerate(sentences(answer)[:6])
        )

    return edit


def _wrap(before: str, after: str) -> Edit:
    return lambda answer, rng: f"{before}{answer}{after}"


def _first(change: Edit) -> Edit:
    """The edit of the first sentence alone."""

    def edit(answer: str, rng: random.Random) -> str:
        first, *rest = sentences(answer)
        return " ".join([change(first, rng), *rest])

    return edit


def _last(change: Edit) -> Edit:
    """The edit of the last sentence alone."""

    def edit(answer: str, rng: random.Random) -> str:
        *rest, last = sentences(answer)
        return " ".join([*rest, change(last, rng)])

    return edit


def _replace(old: str, new: str) -> Edit:
    return lambda answer, rng: re.sub(old, new, answer)


def _no_lower(response: str) -> bool:
    return response == response.lower()


_FORMS = (
    _form("numbers", "Number the steps. | Use a numbered list. | Number the sentences. | "
          "Write a numbered list.", _each("{n}. "), r"^\s*1[.)] "),
    _form("letters", "Letter the steps. | Use a lettered list. | Write a list from a to z.",
          _each("{a}) "), r"^\s*a[.)] "),
    _form("roman", "Number the steps with an i. | Use small i, ii, iii.", _each("({i}) "),
          r"^\s*\(?i\) "),
    _form("steps", "Write it in steps. | Call each sentence a step. | Use steps.",
          _each("Step {n}: "), r"^\s*step 1"),
    _form("arrows", "Put an arrow before each sentence. | Use arrows. | Write it with arrows.",
          _each("→ "), r"^→"),
    _form("stars", "Put a star before each sentence. | Use stars. | Write it with stars.",
          _each("★ "), r"^★ "),
    _form("ticks", "Tick each sentence. | Put a tick before each sentence. | Use ticks.",
          _each("✓ "), r"^✓ "),
    _form("rows", "Put every sentence apart. | Start each sentence lower down. | "
          "Break after each sentence.", _each(""), r"[.!?]\n+\S"),
    _form("slashes", "Put slashes between the sentences. | Use slashes.", _each("", " / "), r" / "),
    _form("dashes", "Put dashes between the sentences. | Use dashes.", _each("", " – "), r" [–—] "),
    _form("bars", "Put bars between the sentences. | Use bars.", _each("| "), r"^\| "),
    _form("small", "Write small. | Use small characters only. | Use lowercase.",
          lambda answer, rng: answer.lower(), _no_lower),
    _form("every word large", "Start every word large. | Begin each word with a large character.",
          lambda answer, rng: answer.title(), lambda r: r == r.title()),
    _form("italics", "Use italics. | Put it in italics. | Write in italics.", _wrap("*", "*"),
          r"\A\*[^*\n]+\*\Z"),
    _form("italic start", "Put the start in italics. | Begin in italics.",
          _first(lambda s, rng: f"*{s}*"), r"\A\*[^*\n]+\*"),
    _form("underline", "Underline it. | Use underlining.", _wrap("__", "__"), r"__[^_]+__"),
    _form("quotes", "Put it in quotes. | Use quotation signs. | Wrap it in quotes.",
          _wrap('"', '"'), r'\A["“].*["”]\Z'),
    _form("quoted end", "Put the end in quotes. | Quote the last sentence.",
          _last(lambda s, rng: f'"{s}"'), r'["”]\Z'),
    _form("parentheses", "Use parentheses. | Put it in parentheses.", _wrap("(", ")"),
          r"\A\(.*\)\Z"),
    _form("end in parentheses", "Put the last sentence in parentheses. | End in parentheses.",
          _last(lambda s, rng: f"({s})"), r"\)\Z"),
    _form("brackets", "Use square brackets. | Put it in square brackets.", _wrap("[", "]"),
          r"\A\[.*\]\Z"),
    _form("tags", "Wrap it in tags. | Use answer tags.", _wrap("<answer>", "</answer>"),
          r"<answer>"),
    _form("code", "Write it as code. | Use a code frame. | Put it in backticks.",
          _wrap("```\n", "\n```"), r"```"),
    _form("frame above", "Draw dashes above it. | Begin with dashes.",
          _wrap("---\n", ""), r"\A---"),
    _form("frame below", "Draw dashes below it. | End with dashes.", _wrap("", "\n---"), r"---\Z"),
    _form("equals signs", "Put equals signs around it. | Use equals signs.", _wrap("== ", " =="),
          r"\A==.*==\Z"),
    _form("tildes", "Put tildes around it. | Use tildes.", _wrap("~ ", " ~"), r"\A~.*~\Z"),
    _form("indent", "Indent it. | Use an indent. | Push it to the right.", _wrap("    ", ""),
          r"\A {3,}"),
    _form("quotation sign in front", "Begin with a larger-than sign. | Write it as in a mail.",
          _wrap("> ", ""), r"\A> "),
    _form("dots", "End with dots. | Trail off. | Use dots at the end.",
          _replace(r"[.!?]\Z", "..."), r"(\.\.\.|…)\Z"),
    _form("dots between", "Put dots between the sentences. | Pause with dots.",
          _replace(r"\. ", "... "), r"(\.\.\.|…) "),
    _form("semicolon", "Use semicolons. | "
          "Link the sentences with a semicolon.", _replace(r"\. ", "; "), r";"),
    _form("no commas", "Use no commas. | Drop the commas.",
          _replace(",", ""), lambda r: "," not in r),
    _form("ampersand", "Write & for and. | Use the ampersand.", _replace(r"\band\b", "&"), r" & "),
    _form("plus", "Write plus for and. | Use plus signs.", _replace(r"\band\b", "+"), r" \+ "),
    _form("drop last", "Drop the last sentence. | Omit the end. | Stop earlier.",
          lambda answer, rng: " ".join(sentences(answer)[:-1]) or answer,
          lambda r: len(sentences(r)) == 1),
    _form("repeat", "Repeat the first sentence at the end. | Say the first sentence again.",
          lambda answer, rng: f"{answer} {sentences(answer)[0]}",
          lambda r: len(sentences(r)) > 1 and sentences(r)[0] == sentences(r)[-1]),
    _form("double", "Say it twice. | Repeat the whole answer.",
          lambda answer, rng: f"{answer} {answer}",
          lambda r: r[: len(r) // 2].strip() == r[len(r) // 2 :].strip()),
    _form("perhaps", "Begin each sentence with perhaps. | Use perhaps.",
          _each("Perhaps: ", " "), r"\Aperhaps"),
    _form("firstly", "Use firstly and secondly. | Say firstly, secondly.",
          lambda answer, rng: " ".join(
              f"{('Firstly', 'Secondly', 'Thirdly', 'Fourthly')[min(n, 3)]}, {s}"
              for n, s in enumerate(sentences(answer))), r"\Afirstly"),
    _form("then", "Link the sentences with then. | Put then between the sentences.",
          _each("", " Then: "), r" then: "),
    _form("I", "Use the first person. | Speak of yourself.",
          lambda answer, rng: f"I do it so: {answer}", r"\bI do it\b"),
    _form("advice of ours", "Speak as a team. | Say we.",
          lambda answer, rng: f"We say: {answer}", r"\bwe say\b"),
    _form("rhyme sign", "Put notes around it. | Make it look as a song.", _wrap("♪ ", " ♪"), r"♪"),
    _form("hearts", "Put hearts around it. | Use hearts.", _wrap("♥ ", " ♥"), r"♥"),
)  # fmt: skip

RULES: dict[str, Rule] = {
    rule.name: rule for rule in (*(_topic(n, s) for n, s in _TOPICS.items()), *_SAID, *_FORMS)
}
"""By name."""
