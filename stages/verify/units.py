r"""Units at the end of an answer: a list of real units, in words, symbols and LaTeX.

`5\text{ cm}`, `5 cm`, `5\,\mathrm{km/h}`, `90^\circ`, `50\%`, `\$5` and `5 dollars` have the value 5. Only the units
listed here are removed. A constant, a variable, an operation or a multiplier after a number is part of the answer and
stays: `5\mathrm{i}`, `7\text{x}`, `5\text{ squared}`, `5\text{ million}`.
"""

import re
from functools import lru_cache

MAX_UNIT_CHARACTERS = 80
# Spellings, one unit a line. Plurals in -s or -es are implied. Case matters in spellings of up to 3 letters.
_MEASURES = r"""
m meter metre
km kilometer kilometre
cm centimeter centimetre
mm millimeter millimetre
dm decimeter decimetre
nm nanometer nanometre
µm μm um micrometer micrometre micron
in inch
ft foot feet
yd yard
mi mile
g gram gm
kg kilogram kilo
mg milligram
µg μg ug microgram
lb pound
oz ounce
ton tonne
l L liter litre
ml mL milliliter millilitre
cl cL centiliter centilitre
dl dL deciliter decilitre
gal gallon
qt quart
pt pint
cup
tbsp tablespoon
tsp teaspoon
cc
s sec second
ms millisecond
min minute
h hr hour
day
week
month
yr year
decade
century centuries
am a.m. a.m AM
pm p.m. p.m PM
mph
kph kmh kmph
rpm
acre
ha hectare
degree deg celsius fahrenheit
rad radian
N newton
kN
J joule
kJ kilojoule
MJ
W watt
kW kilowatt
MW megawatt
kWh
V volt
mV
kV
amp ampere mA
ohm Ω
Pa pascal
kPa
K kelvin
Hz hertz
kHz
MHz
GHz
mol mole
cal calorie
kcal kilocalorie
bit
byte
KB kB kilobyte
MB megabyte
GB gigabyte
dollar USD usd buck
cent
euro EUR
£ GBP
rupee Rs Rs. rs INR
yen JPY
yuan RMB
peso
percent percentage pct
"""
# Nouns for counted things; they do not change the value and are not compared.
_COUNTED = """
unit point time way people person man men woman women child children boy girl student kid friend customer passenger
employee worker teacher player member guest team group class page book word letter question problem piece slice pack
package box bag bottle can jar carton item object thing number integer digit solution root value element term factor
divisor multiple prime pair set subset triple triangle square circle rectangle side edge vertex vertices face diagonal
angle line ray region section outcome arrangement permutation combination path route step move turn round game match
goal vote ticket coin penny pennies nickel dime quarter marble ball bead block tile brick card cookie candy candies
apple orange banana egg fish bird dog cat cow chicken duck animal tree flower rose plant seed fruit pencil pen crayon
sticker stamp toy car wheel bus seat chair table room house home shirt sock shoe pill meal serving trip lap row column
th st nd rd
"""
_CURRENCY_SIGNS = {"$": "dollar", "€": "euro", "£": "£", "¥": "yen", "₹": "rupee"}
# A symbol of one letter is a unit only in \text{..} or \mathrm{..}; otherwise it is a variable. Outside them and
# without a space, these symbols are products of variables too.
_TOO_SHORT_TO_GLUE = frozenset(
    "in mg ms mi ml pt um us am pm rad min ha Pa kN kJ kW MW MJ mV kV mA cc".split()
)
_COMPOUNDS = {"mph": "mi/h", "kph": "km/h"}
_POWERS = frozenset(("square", "sq", "sq.", "cubic", "cu", "cu."))

_UPRIGHT = r"\\(?:text|textrm|textnormal|textbf|textit|mathrm|mathbf|mathit|mbox|hbox|unit|si|rm)(?![A-Za-z])"
_DEGREE = r"(?:\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})|\\degree(?![A-Za-z])|\\textdegree(?![A-Za-z])|°)"
_ORDINAL = r"(?:\^\s*\{?\s*(?:\\(?:text|mathrm)\s*\{\s*)?(?:th|st|nd|rd)\s*\}{0,2}$)"
_SPACE = r"(?:\s|~|\\[,;:! ]|\\quad(?![A-Za-z]))"
_START = re.compile(
    rf"(?=[^0-9])(?:\{{?\s*{_UPRIGHT}|{_DEGREE}|{_ORDINAL}|\\?[%$]|[€£¥₹]|\\frac\s*\{{\s*{_UPRIGHT}|(?<![A-Za-z\\])(?P<bare>[A-Za-zµμΩ]))"
)
_DECORATION = re.compile(rf"{_UPRIGHT}|\\(?:cdot|times)(?![A-Za-z])|·|{_SPACE}|[{{}}]")
_FRACTION = re.compile(rf"\\frac\s*(\{{\s*{_UPRIGHT}[^/]*?\}})\s*\{{(\s*{_UPRIGHT}.*)\}}$")
_TOKEN = re.compile(
    r"(?P<word>[A-Za-zµμΩ]+(?:\.[A-Za-z]+)*\.?|[$£€¥₹%°])|(?P<power>\^?\s*-?\s*[1-4]|[²³])|(?P<per>/)|\s+|\(|\)"
)
_CURRENCY_START = re.compile(
    rf"(?P<sign>-?)\s*(?:(?:US|U\.S\.)?\s*\\?(?P<mark>[$€£¥₹])|\\(?P<name>pounds|euro|yen)(?![A-Za-z])"
    rf"|{_UPRIGHT}\s*\{{\s*(?P<word>Rs\.?|INR|USD|US\\?\$|\\?\$)\s*\}})\s*{_SPACE}*"
)


def _names() -> dict[str, str]:
    """Return the unit of each spelling; '' for counted things."""
    names: dict[str, str] = {}
    for line in _MEASURES.split("\n"):
        spellings = line.split()
        for spelling in spellings:
            names[spelling] = spellings[0]
    names |= dict.fromkeys(_COUNTED.split(), "") | _CURRENCY_SIGNS | {"%": "percent", "°": "degree"}
    return names


_NAMES = _names()


def split_unit(text: str) -> tuple[str, str | None]:
    """Split `text` into the value and the unit at its end: None without one, '' for a counted thing.

    Powers are ignored: cm and cm^2 are the same unit, cm and m are not.
    """
    if text[-1:].isdigit() and "^" not in text:
        return text, None
    offset = max(0, len(text) - MAX_UNIT_CHARACTERS)
    for match in _START.finditer(text, offset):
        head, tail = text[: match.start()].rstrip(), text[match.start() :]
        head = head.removesuffix(r"\,").rstrip()
        glued = len(head) == match.start()
        if not head or head[-1] in "+-*/=<>,([{^_" or not (head.isdigit() or _is_balanced(head)):
            continue
        if match["bare"]:
            if not re.search(r"[0-9][})]*\.?$", head) or not _is_bare_unit(tail, glued):
                continue
        unit = unit_of(tail)
        if unit is not None:
            return head, unit
    return text, None


def _is_balanced(text: str) -> bool:
    count = text.count
    brackets_match = count("(") + count("[") == count(")") + count("]")  # [0,5) is balanced
    return brackets_match and count("{") == count("}")


def split_currency(text: str) -> tuple[str, str | None]:
    r"""Split `text` into the value and the currency before it, as in `\$5` and `-\$5`, or None."""
    match = _CURRENCY_START.match(text) if text[:1] in "-$€£¥₹U\\" else None
    if (
        match is None
        or match.end() == len(text)
        or not re.match(r"[-.0-9{\\(]", text[match.end() :])
    ):
        return text, None
    mark = (
        match["mark"]
        or {"pounds": "£", "euro": "€", "yen": "¥"}.get(match["name"] or "")
        or match["word"]
    )
    return match["sign"] + text[match.end() :], _NAMES.get(
        mark.strip("\\US"), _NAMES.get(mark, "dollar")
    )


def _is_bare_unit(tail: str, glued: bool) -> bool:
    word = re.match(r"[A-Za-zµμΩ.]+", tail)
    assert word is not None, "a bare unit starts with a letter"
    return len(word[0].rstrip(".")) > 1 and not (glued and word[0] in _TOO_SHORT_TO_GLUE)


@lru_cache(maxsize=4096)  # a set of problems has few units
def unit_of(text: str) -> str | None:
    r"""Return `text` as a unit, 'km/hour' for `\text{ km}/\mathrm{h}`; None if a part is not a unit."""
    text = _FRACTION.sub(r"\1/\2", text)
    text = re.sub(_ORDINAL, " th ", re.sub(_DEGREE, " ° ", text))
    text = _DECORATION.sub(" ", text.replace(r"\%", "%").replace(r"\$", "$"))
    text = re.sub(r"°\s*[CF](?![A-Za-z])", "°", text)
    parts: list[str] = []
    position, sign, is_named = 0, "", False
    while position < len(text):
        token = _TOKEN.match(text, position)
        if token is None:
            return None
        position = token.end()
        word = token["word"]
        if token["per"] or word == "per":
            sign = "/"
        elif token["power"] or word in ("squared", "cubed"):
            if not is_named:
                return None
            if parts and "-" in token[0]:
                parts[-1] = "/" + parts[-1]
        elif word and word.lower() not in _POWERS:
            name = _name(word)
            if name is None:
                return None
            is_named = True
            parts += [sign + name] if name else []
            sign = ""
    return _joined(parts) if is_named else None


def _name(word: str) -> str | None:
    for spelling in (word, word.rstrip(".")):
        if spelling in _NAMES:
            return _NAMES[spelling]
        if len(spelling) > 3:
            lower = spelling.lower()
            for form in (lower, lower.removesuffix("s"), lower.removesuffix("es")):
                if len(form) > 1 and form in _NAMES:
                    return _NAMES[form]
        elif spelling.endswith("s") and len(spelling) == 3 and spelling[:-1] in _NAMES:
            return _NAMES[spelling[:-1]]  # lbs, hrs
    return None


def _joined(parts: list[str]) -> str:
    """Return one spelling of a compound unit for any order of its factors."""
    top = sorted({part for part in parts if not part.startswith("/")})
    bottom = sorted({part for part in parts if part.startswith("/")})
    name = "·".join(top) + "".join(bottom)
    return _COMPOUNDS.get(name, name)
