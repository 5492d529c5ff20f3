"""Many more words for what demo clips show than their captions use, for training the text encoder.

Every table has a part that training never sees (`HELD_...`), so that reading of unknown wordings can be measured.
Words that only a dictionary explains (crimson) cannot be held out; ways to put known words together can.
"""

from __future__ import annotations

from dataclasses import dataclass

from tools.demo.captions import WAYS as CAPTION_WAYS

SHAPES = {
    "circle": ("circle", "disc", "disk", "ball", "round shape", "circular shape", "sphere"),
    "square": ("square", "box", "square shape", "block"),
    "triangle": ("triangle", "triangular shape", "three-sided shape", "triangle shape"),
    "star": ("star", "five-pointed star", "pentagram", "star shape", "starlet", "star-shaped figure"),
    "ring": ("ring", "hoop", "donut", "doughnut", "annulus", "ring shape", "torus", "hollow circle"),
    "cross": ("cross", "plus sign", "plus", "plus symbol", "cross shape", "plus-shaped figure"),
    "diamond": ("diamond", "rhombus", "lozenge", "diamond shape", "rhomb"),
    "hexagon": ("hexagon", "six-sided polygon", "six-sided shape", "hexagonal shape", "hex", "hexagon shape"),
    "heart": ("heart", "love heart", "heart shape", "valentine heart"),
}
COLOURS = {
    "red": ("red", "crimson", "scarlet", "ruby", "cherry red", "ruby red", "blood-red"),
    "orange": ("orange", "tangerine", "orange-coloured", "apricot", "pumpkin"),
    "yellow": ("yellow", "golden", "lemon", "gold", "lemon-yellow", "canary yellow", "sunny yellow"),
    "green": ("green", "emerald", "grass-green", "lime", "lime green", "emerald green"),
    "cyan": ("cyan", "turquoise", "aqua", "teal", "aquamarine", "cyan-coloured"),
    "blue": ("blue", "azure", "cobalt", "sapphire", "royal blue", "cobalt blue", "ultramarine"),
    "purple": ("purple", "violet", "lilac", "lavender", "mauve", "plum", "amethyst"),
    "pink": ("pink", "rose", "fuchsia", "salmon", "hot pink", "magenta", "rosy"),
}
GROUND_COLOURS = {
    "black": ("black", "jet black", "pitch-black", "pure black", "ebony"),
    "white": ("white", "snow-white", "pure white", "snowy white", "bright white"),
    "gray": ("gray", "grey", "medium gray", "ash grey", "slate grey", "neutral gray"),
    "dark blue": ("dark blue", "navy blue", "navy", "midnight blue", "deep blue", "dark-blue"),
    "dark green": ("dark green", "forest green", "deep green", "bottle green", "dark-green"),
    "brown": ("brown", "chocolate", "coffee brown", "dark brown", "chestnut"),
    "beige": ("beige", "cream", "tan", "sand-coloured", "sandy", "ivory", "cream-colored"),
    "light blue": ("light blue", "pale blue", "sky blue", "baby blue", "powder blue", "light-blue"),
}
SIZES = {
    "small": ("small", "little", "tiny", "wee", "mini", "miniature", "petite", "smallish", "minuscule"),
    "medium": ("", "", "", "", "medium-sized", "medium", "mid-sized", "average-sized", "normal-sized", "middle-sized"),
    "large": ("large", "big", "huge", "giant", "enormous", "massive", "great", "oversized", "gigantic", "great big"),
}
SPEEDS = {
    "slow": ("slowly", "gently", "at a slow pace", "slow", "leisurely", "lazily", "calmly", "unhurriedly",
             "very slowly",
             "at low speed", "at a snail's pace", "sluggishly", "without haste", "in slow motion", "with low speed"),
    "medium": ("", "", "", "", "", "steadily", "at medium speed", "at a moderate pace", "at normal speed", "smoothly"),
    "fast": ("quickly", "rapidly", "at high speed", "fast", "swiftly", "speedily", "briskly", "hurriedly", "very fast",
             "at full speed", "in a hurry", "at a fast pace", "at great speed", "with high speed", "very quickly"),
}  # fmt: skip
HELD_SPEEDS = {
    "slow": ("rather slowly", "in a slow way", "with little speed", "quite gently"),
    "medium": ("",),
    "fast": ("rather quickly", "in a fast way", "with much speed", "really fast"),
}
MODIFIERS = ("bright", "vivid", "deep", "pure", "rich", "intense", "strong")
ADJECTIVES = ("shiny", "lovely", "cute", "single", "simple", "solid", "glossy", "neat", "beautiful", "lone", "flat",
              "nice", "clean", "cheerful", "geometric", "bright", "plain")  # fmt: skip

# ---- verbs ----

GO = ("move", "drift", "glide", "slide", "travel", "float", "go", "fly", "sail", "head", "shift", "roll", "walk",
      "slip", "pass", "proceed", "advance", "cruise", "make its way", "push", "stream", "keep moving", "come", "hover",
      "wander off", "flow", "step", "be on its way", "swim")  # fmt: skip
HELD_GO = ("march", "scroll", "skate", "migrate", "journey", "trundle", "translate", "coast", "ride", "surf")
GO_FAST = ("rush", "dash", "race", "zoom", "dart", "shoot", "speed", "hurry", "sprint", "whizz")
GO_SLOW = ("creep", "crawl", "inch", "stroll", "amble")
RISE = {"up": ("rise", "ascend", "climb", "soar", "levitate", "go up", "lift off"),
        "down": ("fall", "descend", "sink", "drop", "plunge", "go down", "dive")}  # fmt: skip
DO = {
    "bounce": ("bounce", "bounce up and down", "hop", "hop on the spot", "jump", "jump up and down",
               "bounce like a ball",
               "spring up and down", "leap up and down", "hop repeatedly", "move up and down", "go up and down",
               "bob up and down", "jump again and again"),
    "orbit": ("circle", "move in a circle", "orbit", "orbit the middle", "orbit around the centre", "revolve",
              "go around in circles", "run in circles", "travel along a circular path", "follow a circle",
              "loop around",
              "go round and round", "trace a circle", "circulate", "orbit the center", "circle around the middle",
              "fly in circles", "move along a circle", "go round in a circle"),
    "rotate": ("rotate", "spin", "turn", "twirl", "whirl", "pivot", "rotate in place", "spin in place",
               "turn on the spot",
               "turn around its own centre", "rotate around its own axis", "spin around itself", "spin like a wheel",
               "rotate about its center", "spin on the spot", "twist around", "turn like a wheel"),
    "grow": ("grow", "grow larger", "expand", "get bigger", "become larger", "swell", "enlarge", "increase in size",
             "inflate", "scale up", "get larger and larger", "become bigger", "grow in size", "swell up", "get larger"),
    "shrink": ("shrink", "contract", "get smaller", "become smaller", "decrease in size", "diminish", "dwindle",
               "deflate", "scale down", "get smaller and smaller", "shrink in size", "become tinier", "get tinier"),
    "still": ("stay still", "stand still", "rest motionless", "remain in place", "sit still", "sit", "keep still",
              "rest",
              "stay in place", "be still", "be motionless", "hold its position", "stay put", "be at rest", "stay",
              "be stationary", "remain still", "be frozen", "stand", "remain motionless", "hang in place"),
    "wobble": ("wobble", "wobble like jelly", "jiggle", "quiver", "wiggle", "shake like jelly", "jiggle like jelly"),
}  # fmt: skip
HELD_DO = {
    "bounce": ("keep bouncing", "keep jumping", "hop up and down", "bounce again and again", "leap on the spot"),
    "orbit": ("keep circling", "travel in a circle", "run around in a circle", "orbit around the middle",
              "describe a circle", "glide along a circular path"),
    "rotate": ("keep spinning", "spin around its own axis", "turn around its axis", "rotate on the spot",
               "twirl in place", "whirl like a wheel", "keep turning"),
    "grow": ("keep growing", "grow bigger and bigger", "expand in size", "become larger and larger", "swell in size"),
    "shrink": ("keep shrinking", "become smaller and smaller", "contract in size", "shrink more and more",
               "grow smaller"),
    "still": ("keep its position", "stand motionless", "be at a standstill", "hold still", "sit motionless"),
    "wobble": ("keep wobbling", "wiggle like jelly"),
}  # fmt: skip
IRREGULAR = {  # finite, participle, plural
    "be": ("is", "being", "are"), "go": ("goes", "going", "go"),
    "not move": ("does not move", "not moving", "do not move"),
}  # fmt: skip
STILL_SENTENCES = (
    ("does not move", "not moving", "do not move"), ("doesn't move", "without moving", "don't move"),
    ("does not move at all", "without any motion", "do not move at all"), ("stays motionless", "motionless",
    "stay motionless"), ("never moves", "stationary", "never move"),
)  # fmt: skip
HELD_STILL = (("is not moving at all", "without any movement", "are not moving at all"),)
DOUBLED = ("spin", "hop", "run", "get", "sit", "step", "slip", "drop", "bob", "swim", "travel")
BEFORE = {  # a motion as an adjective
    "bounce": ("bouncing", "hopping", "jumping"), "orbit": ("orbiting", "circling"), "rotate": ("rotating", "spinning"),
    "grow": ("growing", "expanding"), "shrink": ("shrinking", "contracting"), "still": ("motionless", "stationary"),
    "wobble": ("wobbling", "jiggling"),
}  # fmt: skip

# ---- directions ----

SIDE = ("to the {l}", "{l}", "{l}wards", "{l}ward", "from {r} to {l}", "from the {r} to the {l}", "towards the {l}",
        "toward the {l}", "towards the {l} edge", "to the {l} edge", "to the {l} side", "to the {l} of the frame",
        "across the screen to the {l}", "off to the {l}", "towards the {l}-hand side", "in a {l}ward direction",
        "over to the {l}", "from the {r} side to the {l} side", "across the frame from {r} to {l}", "{w}wards",
        "{l}wards across the picture", "toward the {l} side of the screen", "horizontally to the {l}")  # fmt: skip
HELD_SIDE = ("in the direction of the {l}", "to the {l}-hand side of the picture", "toward the {l} border",
             "away to the {l}", "starting at the {r} and ending at the {l}", "further and further {l}",
             "straight to the {l}", "across the picture, {r} to {l}", "{l}wards over the screen")  # fmt: skip
VERTICAL = ("{v}", "{v}wards", "{v}ward", "straight {v}", "towards the {t}", "to the {t}", "toward the {t} edge",
            "from {b} to {t}", "from the {b} to the {t}", "vertically {v}", "{v} the screen", "in an {v}ward direction",
            "to the {t} of the frame", "from the {b} edge to the {t} edge", "towards the {t} side", "to the {u} edge",
            "towards the {t} of the picture", "{n}wards", "vertically from {b} to {t}")  # fmt: skip
HELD_VERTICAL = (
    "in the direction of the {t}",
    "further and further {v}",
    "straight to the {t}",
    "directly {v}",
    "starting at the {b} and ending at the {t}",
    "toward the {t} border",
    "{v}wards over the screen",
)
DIAGONAL = ("to the {u} {l}", "towards the {u} {l}", "{v} and to the {l}", "diagonally {v} and {l}",
            "towards the {t} {l} corner", "to the {t} {l}", "{v} and {l}", "{l} and {v}", "{v}wards and {l}wards",
            "{v}-{l}", "{v} {l}", "to the {t}-{l} corner", "diagonally to the {u} {l}",
            "diagonally towards the {t} {l}",
            "from the {b} {r} to the {t} {l}", "from {o} {r} to {u} {l}", "to the {l} and {v}wards", "{n}-{w}",
            "{n}{w}",
            "from the {b} {r} corner to the {t} {l} corner", "diagonally {v}wards to the {l}", "{v} towards the {l}",
            "toward the {u} {l} corner", "{v} and leaning {l}", "at an angle, {v} and {l}",
            "diagonally to the {l} and {v}")  # fmt: skip
HELD_DIAGONAL = (
    "in the direction of the {u} {l}",
    "on a diagonal, {v} and to the {l}",
    "both {v} and {l}",
    "{l}wards and {v}wards",
    "into the {u} {l} corner",
    "diagonally {l} and {v}",
    "starting at the {b} {r} and ending at the {t} {l}",
    "diagonally into the {t} {l} corner",
)
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
TOP = {"up": "top", "down": "bottom"}
UPPER = {"up": "upper", "down": "lower"}
COMPASS = {"left": "west", "right": "east", "up": "north", "down": "south"}


def ways(motion: str, held: bool) -> tuple[str, ...]:
    """Phrases for one of `DIRECTIONS`."""
    *vertical, side = motion.split() if motion not in TOP else (motion, "")
    fields = {"l": side, "r": OPPOSITE.get(side, ""), "w": COMPASS.get(side, "")}
    if vertical:
        v = vertical[0]
        fields |= {"v": v, "t": TOP[v], "b": TOP[OPPOSITE[v]], "u": UPPER[v], "o": UPPER[OPPOSITE[v]], "n": COMPASS[v]}
    forms = (DIAGONAL, HELD_DIAGONAL) if vertical and side else (SIDE, HELD_SIDE) if side else (VERTICAL, HELD_VERTICAL)
    made = tuple(form.format(**fields) for form in forms[held])
    return made if held else (*made, *CAPTION_WAYS[motion])


def inflect(phrase: str) -> tuple[str, str, str]:
    """Third person, present participle and plural of a verb with what follows it: "get bigger" -> "gets bigger"."""
    verb, blank, rest = phrase.partition(" ")
    plural = rest.replace("its", "their")
    if verb in IRREGULAR:
        finite, participle, many = IRREGULAR[verb]
        return finite + blank + rest, (rest if verb == "be" else participle + blank + rest), many + blank + plural
    if verb[-1] == "y" and verb[-2] not in "aeiou":
        finite = verb[:-1] + "ies"
    else:
        finite = verb + ("es" if verb.endswith(("sh", "ch", "ss", "x", "zz")) else "s")
    if verb in DOUBLED:
        stem = verb + verb[-1]
    else:
        stem = verb[:-1] if verb.endswith("e") and not verb.endswith(("ee", "oe")) else verb
    return finite + blank + rest, f"{stem}ing{blank}{rest}", verb + blank + plural


# ---- sentences ----


@dataclass(frozen=True)
class Frames:
    """Forms of sentences. {o} a shape, {f} {p} {m} its motion (finite, participle, adjective), {ground} {where}."""

    shapes: tuple[str, ...]
    both: tuple[str, ...]
    scenes: tuple[str, ...]
    openings: tuple[str, ...]
    endings: tuple[str, ...]
    sides: tuple[str, ...]
    links: tuple[str, ...]
    ground_sentences: tuple[str, ...]
    prepositions: tuple[str, ...]


TRAINED = Frames(
    shapes=("{o} {f}", "{o} {f}", "{o} {p}", "{o} {p}", "{o} is {p}", "{o} that {f}", "{o} which is {p}", "{o}. it {f}",
            "{o}, {p}", "{o} can be seen {p}", "{o} keeps {p}", "{o} as it {f}", "there is {o} {p}", "{o}; it {f}",
            "{o} that is {p}", "{o}, and it {f}", "{o}. the {s} {f}", "{o}. the {s} is {p}"),
    both=("{a} and {b} both {m}", "{a} and {b} {m} together", "{a} and {b} {m}"),
    scenes=("{scene} {where}", "{scene} {where}", "{where}, {scene}", "{where} {scene}", "{scene}. {sentence}",
            "{sentence}. {scene}", "{scene}, {ground}", "{ground}, {scene}", "{ground} with {scene}",
            "{ground}: {scene}",
            "{scene}, {where}", "{scene}; {sentence}"),
    openings=("a video of", "a clip of", "an animation of", "video:", "a short video showing", "we see", "you can see",
              "show me", "please make a video of", "the video shows", "in this clip,", "an animation in which",
              "a movie where", "picture this:", "a scene with", "imagine", "watch as"),
    endings=("in a simple flat style", "high quality", "for the whole clip", "the whole time", "without stopping", "4k",
             "seen from the front", "with a static camera", "the camera is fixed", "all the time", "minimalist",
             "please"),
    sides=("on the {l}", "on the {l} side", "in the {l} half", "at the {l}", "on the far {l}"),
    links=(" while ", " and ", ", ", "; ", ". ", " as ", ", and ", " whereas ", " with ", " next to "),
    ground_sentences=("the background is {n}", "the scene has {n}", "behind it all is {n}", "it all happens on {n}",
                      "behind it is {n}", "the backdrop is {n}", "{n} fills the frame", "there is {n} behind it",
                      "background: {n}", "the picture has {n}"),
    prepositions=("over", "on", "against", "in front of", "across", "upon", "above", "with", "on top of"),
)  # fmt: skip
HELD = Frames(
    shapes=("look how {o} {f}", "{o} seems to be {p}", "{o} while it is {p}", "here {o} {f}", "{o} which {f}",
            "see {o} {p}"),
    both=("{a} and {b} all {m}", "both {a} and {b} {m}"),
    scenes=("{scene}, all of it {where}", "{ground} behind {scene}", "{scene} - {ground}", "{where} we find {scene}",
            "{sentence}, and {scene}", "{scene}, and {sentence}"),
    openings=("a short film of", "please generate", "render", "i would like to see", "footage of", "a gif of"),
    endings=("from start to end", "hd", "seen by a still camera", "in a clean look", "thank you"),
    sides=("on the {l}-hand side", "at the {l} side of the picture", "in the {l} part"),
    links=(" meanwhile ", " but ", " plus ", " / "),
    ground_sentences=("one sees {n} behind", "all this is set on {n}", "the ground is {n}"),
    prepositions=("before", "in", "set against", "placed on"),
)  # fmt: skip

# Backgrounds as noun phrases.
GROUNDS = {
    "plain": ("a {a} background", "a plain {a} background", "{a} background", "a solid {a} background", "{a}",
              "a {a} backdrop", "a uniform {a} background", "a {a} surface", "a {a} canvas", "an all {a} background",
              "a background of {a}", "the {a} background", "an empty {a} background"),
    "horizontal stripes": ("horizontal {a} and {b} stripes", "a background of {a} and {b} horizontal stripes",
                           "a horizontally striped {a} and {b} background",
                           "a {a} and {b} background with horizontal stripes",
                           "horizontal stripes in {a} and {b}", "{a} and {b} horizontal bands",
                           "{a}-and-{b} horizontal stripes",
                           "stripes of {a} and {b} that run horizontally", "horizontal stripes of {a} and {b}"),
    "vertical stripes": ("vertical {a} and {b} stripes", "a background of {a} and {b} vertical stripes",
                         "a vertically striped {a} and {b} background",
                         "a {a} and {b} background with vertical stripes",
                         "vertical stripes in {a} and {b}", "{a} and {b} vertical bands",
                         "{a}-and-{b} vertical stripes",
                         "stripes of {a} and {b} that run vertically", "vertical stripes of {a} and {b}"),
    "checker": ("a {a} and {b} checkerboard", "a checkered background of {a} and {b} squares",
                "a {a}-and-{b} checkerboard",
                "a {a} and {b} checkered background", "{a} and {b} checks", "a chessboard of {a} and {b}",
                "a checkerboard pattern in {a} and {b}", "a {a} and {b} chequered backdrop",
                "a checkerboard of {a} and {b}"),
    "dots": ("a {a} background with {b} dots", "{a} dotted with {b}", "{b} dots on {a}",
             "{b} polka dots on a {a} background",
             "a {a} background full of {b} dots", "a {b}-dotted {a} background", "a {a} backdrop with {b} spots",
             "a {a} background covered in {b} polka dots", "a {a} surface with {b} points"),
    "gradient": ("a gradient from {a} at the top to {b} at the bottom",
                 "a background that fades from {a} above to {b} below",
                 "a {a} to {b} gradient", "a gradient from {a} to {b}", "a vertical gradient of {a} to {b}",
                 "a background fading from {a} to {b}", "{a} above that turns into {b} below",
                 "a gradient background, {a} on top and {b} at the bottom", "a smooth {a}-to-{b} gradient"),
}  # fmt: skip
HELD_GROUNDS = {
    "plain": ("a completely {a} background", "nothing but {a}", "a {a} scene", "a simple {a} backdrop"),
    "horizontal stripes": ("a backdrop of horizontal stripes, {a} and {b}", "horizontally striped {a} and {b}"),
    "vertical stripes": ("a backdrop of vertical stripes, {a} and {b}", "vertically striped {a} and {b}"),
    "checker": ("a checkered {a} and {b} surface", "squares of {a} and {b} like a chessboard"),
    "dots": ("a {a} canvas with {b} polka dots", "a dotted background, {b} dots on {a}"),
    "gradient": ("a gradient background that goes from {a} to {b}", "a backdrop that fades from {a} to {b}"),
}
PREFIX_SPEED = {"slow": ("slowly", "gently"), "medium": ("",), "fast": ("quickly", "rapidly")}
