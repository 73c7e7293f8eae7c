"""Generated question answering: facts hidden in prose, and questions about them, to train eviction heads on.

What a head should learn is which tokens of a text a later question may need, before the question is known. So the facts
are of many forms, in many wordings, about made-up subjects, and none of the wordings or words of the evaluation
(`kvjax.tasks`) is among them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

FIRST = """Adrian Agnes Alina Amir Anton Astrid Beatrice Bruno Camille Cedric Daphne Dmitri Elena Elias Esther Farid
Fiona Gareth Gloria Hamza Hannah Ingrid Ivan Jasmine Joel Kamal Katrin Lars Leila Lucia Magnus Maya Mikhail Naomi Noel
Olga Omar Paula Pedro Priya Quentin Rafael Rosa Samir Selma Stefan Tamara Theo Ulrich Ursula Vera Wanda Xavier Yara
Yusuf Zelda""".split()
LAST = """Abbott Alvarez Bakker Bauer Bianchi Castillo Chen Dalton Devereux Duarte Eriksen Farrell Fischer Fontaine
Gallagher Grant Haddad Hartmann Holloway Ibrahim Jansen Jensen Kapoor Keller Kovacs Kowalski Larsen Lindqvist Lombardi
Maddox Marchetti Mbeki Moreau Nakamura Novak Okafor Osborne Pereira Petrov Quinn Rahman Rossi Sandoval Schulz Sinclair
Sorensen Takahashi Tanaka Thornton Ueda Vasquez Voss Whitaker Yamamoto Zhang Zimmerman""".split()
TOWNS = """Aberdeen Aalborg Bordeaux Bruges Cardiff Cordoba Dresden Dundee Espoo Exeter Freiburg Galway Gdansk Ghent
Graz Halifax Innsbruck Izmir Jaipur Kazan Kyoto Leipzig Linz Lyon Madison Malmo Minsk Montreal Nantes Nagoya Orleans
Ottawa Pisa Portland Poznan Reims Riga Rotterdam Salzburg Santiago Sapporo Split Tallinn Tampere Turin Utrecht Valencia
Vilnius Winnipeg York Zagreb Zurich""".split()
LANDS = """Albania Argentina Belgium Bolivia Botswana Bulgaria Canada Chile Croatia Estonia Ethiopia Finland Georgia
Ghana Greece Hungary Iceland Indonesia Jordan Kenya Latvia Malaysia Mexico Mongolia Morocco Nepal Norway Panama
Paraguay Portugal Romania Senegal Slovenia Sweden Thailand Tunisia Uruguay Vietnam Zambia""".split()
STREETS = """Acacia Aldgate Birchwood Bramble Canal Castle Chapel Cherry Church Clifton Elm Fairview Foundry Garden
Granary Harbour Hawthorn Hillcrest Juniper King Lakeside Laurel Maple Market Meadow Mill Orchard Poplar Quarry Queen
Ridge River Rosewood Station Sycamore Vineyard Walnut Willow Windmill""".split()
QUALITIES = """amber ancient bitter brisk broken calm clever cobalt crooked distant drifting dusty eager early faint
fierce frozen gentle hidden hollow humble idle ivory jolly lonely lucky mellow misty narrow nimble noisy patient proud
quiet rapid restless rusty salty scarlet silent sleepy slender stormy sturdy sudden tidy turquoise velvet violet
wandering winding""".split()
THINGS = """anchor anvil badger basket beacon bison bridge candle canyon cello cobra comet compass cricket drum ember
fern ferret fiddle glacier goblet hammer heron island jackal kettle ladder lantern lemur lynx magnet mirror moose
needle oyster paddle panther pebble pelican pillow prairie puffin quill raven saddle sparrow thistle trumpet umbrella
walrus wheel yak""".split()
CODENAMES = """Altair Andromeda Aurora Basalt Borealis Cascade Cobblestone Corvus Deneb Driftwood Equinox Evergreen
Firefly Granite Halcyon Hyperion Icarus Jupiter Kestrel Longbow Meridian Monsoon Nightingale Nimbus Obsidian Orion
Paragon Pegasus Quartz Quasar Rainfall Sequoia Solstice Starling Sundial Tempest Titan Umbra Vanguard Vega Waterfall
Wildfire Yonder Zephyr""".split()
TRADES = """Analytics Bakery Breweries Ceramics Chemicals Couriers Dairies Electric Engineering Foods Foundries
Furniture Glassworks Holdings Instruments Insurance Laboratories Logistics Mills Optics Partners Pharmaceuticals Press
Robotics Shipping Software Steel Systems Textiles Tools Trading Vineyards""".split()
MACHINES = """boiler centrifuge compressor conveyor crane dishwasher elevator excavator forklift freezer furnace
generator heater incubator lathe loom microscope mixer oven printer projector pump router scanner server sewer
spectrometer tractor transformer turbine""".split()
DISHES = """barley-soup bean-stew beetroot-salad cheese-dumplings chestnut-cake chickpea-curry corn-bread fish-pie
garlic-noodles ginger-biscuits honey-tart lamb-casserole leek-quiche lemon-rice lentil-pancakes mushroom-risotto
oat-porridge onion-tart pea-fritters pear-crumble plum-jam potato-gratin pumpkin-ravioli saffron-rolls sesame-crackers
spinach-omelette tomato-broth walnut-bread""".split()
INSTRUMENTS = """accordion bagpipes banjo bassoon cello clarinet cornet flute guitar harmonica harp harpsichord lute
mandolin oboe organ piano piccolo saxophone sitar tambourine timpani trombone trumpet tuba viola violin xylophone
zither""".split()
STUFFS = """alabaster aluminium bamboo basalt beeswax birch bronze canvas cardboard cedar ceramic clay concrete cork
cotton felt glass granite hemp iron jute leather limestone linen mahogany marble nickel nylon oak paper pewter pine
plaster porcelain rubber sandstone silk slate steel teak tin titanium walnut wool zinc""".split()
MONTHS = "January February March April May June July August September October November December".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"


def _one(*of: Sequence[str]) -> Callable:
    """A word of each list, with a space between."""
    return lambda rng: " ".join(words[rng.integers(len(words))] for words in of)


def _digits(least: int, most: int) -> Callable:
    """A number of `least` to `most` digits."""

    def draw(rng):
        size = int(rng.integers(least, most + 1))
        return str(rng.integers(10 ** (size - 1), 10**size))

    return draw


def _pattern(*forms: str) -> Callable:
    """Letters for A, digits for 9, digits or a to f for x, in one of the forms; the rest stands for itself."""
    drawn = {"A": LETTERS, "9": "0123456789", "x": "0123456789abcdef"}

    def draw(rng):
        form = forms[rng.integers(len(forms))]
        return "".join(drawn[sign][rng.integers(len(drawn[sign]))] if sign in drawn else sign for sign in form)

    return draw


def _either(*draws: Callable) -> Callable:
    return lambda rng: draws[rng.integers(len(draws))](rng)


def _written(form: str, **draws: Callable) -> Callable:
    return lambda rng: form.format(**{name: draw(rng) for name, draw in draws.items()})


def _grouped(rng) -> str:
    return f"{rng.integers(1_000, 5_000_000):,}"


def _price(rng) -> str:
    amount = f"{rng.integers(2, 4000)}.{rng.integers(100):02d}"
    return ("${}", "{} euros", "{} dollars", "{} francs", "{} pounds")[rng.integers(5)].format(amount)


def _quantity(*units: str) -> Callable:
    return lambda rng: f"{rng.integers(2, 900)}{('', f'.{rng.integers(1, 10)}')[rng.integers(2)]} {_one(units)(rng)}"


def _time(rng) -> str:
    hour, minute = int(rng.integers(24)), int(rng.integers(60))
    return (f"{hour:02d}:{minute:02d}", f"{hour % 12 or 12}:{minute:02d} {'ap'[hour // 12]}m")[rng.integers(2)]


def _date(rng) -> str:
    day, month, year = int(rng.integers(1, 29)), int(rng.integers(12)), int(rng.integers(1820, 2040))
    forms = (f"{day} {MONTHS[month]} {year}", f"{MONTHS[month]} {day}, {year}", f"{year}-{month + 1:02d}-{day:02d}")
    return forms[rng.integers(3)]


def _address(rng) -> str:
    return f"{rng.integers(1, 300)} {_one(STREETS, ('Street', 'Road', 'Lane', 'Avenue', 'Square'))(rng)}"


def _email(rng) -> str:
    first, last, trade, code = (_one(words)(rng).lower() for words in (FIRST, LAST, TRADES, CODENAMES))
    ending = ("com", "org", "net", "info")[rng.integers(4)]
    who = (f"{first}.{last}", f"{first[0]}{last}", f"{last}{rng.integers(10, 99)}")[rng.integers(3)]
    return f"{who}@{code}-{trade}.{ending}"


def _link(rng) -> str:
    return f"www.{_one(QUALITIES)(rng)}-{_one(THINGS)(rng)}.{('com', 'org', 'net')[rng.integers(3)]}"


def _ip(rng) -> str:
    return ".".join(str(part) for part in rng.integers(1, 255, 4))


def _version(rng) -> str:
    return ".".join(str(part) for part in rng.integers(0, 30, 3))


def _dish(rng) -> str:
    return _one(DISHES)(rng).replace("-", " ")


def _title(rng) -> str:
    return f'the novel "The {PAIR(rng).title()}"'


def _coordinates(rng) -> str:
    return f"{rng.uniform(0, 89):.3f} {'NS'[rng.integers(2)]}, {rng.uniform(0, 179):.3f} {'EW'[rng.integers(2)]}"


def _phrase(rng) -> str:
    """Three to five words without sense, which cannot be guessed from each other."""
    return " ".join(_one(QUALITIES if rng.integers(2) else THINGS)(rng) for _ in range(rng.integers(3, 6)))


def _list(rng) -> str:
    first, second, third = (THINGS[i] for i in rng.choice(len(THINGS), 3, replace=False))
    return f"{first}s, {second}s and {third}s"


PERSON = _one(FIRST, LAST)
COMPANY = _either(_one(LAST, TRADES), _one(CODENAMES, TRADES))
PROJECT = _written("Project {name}", name=_one(CODENAMES))
PAIR = _one(QUALITIES, THINGS)
MACHINE = _written("the {kind} in hall {n}", kind=_one(MACHINES), n=_digits(1, 2))
SERVER = _written("the server {name}", name=_one(CODENAMES))
SHIP = _written("the ship {name}", name=PAIR)
TRAIN = _written("the train to {town}", town=_one(TOWNS))
MUSEUM = _written("the museum of {town}", town=_one(TOWNS))
BRIDGE = _written("the bridge of {town}", town=_one(TOWNS))
ORDER = _written("order {n}", n=_digits(4, 7))
MEETING = _written("the meeting about {what}", what=PAIR)
CODE = _pattern("AA-9999", "A99-AA", "999-AAA-9", "AAA99999", "9A9A9A", "AA.999.AA", "A9999", "AAAA-9999-AA")
PART = _pattern("AA9999-99", "99-9999A", "AAA/999", "9999.99.A", "A-999999")


class Form(NamedTuple):
    """A form of fact: {s} is its subject, {v} its value."""

    subject: Callable
    value: Callable
    sentences: tuple[str, ...]
    questions: tuple[str, ...]
    answer: str  # a whole sentence


FORMS = (
    Form(PERSON, _digits(4, 10),
         ("The customer number of {s} is {v}.", "{s} is listed under customer number {v}."),
         ("Which customer number does {s} have?", "What is {s}'s customer number?"),
         "The customer number of {s} is {v}."),
    Form(PERSON, _pattern("+99 999 9999999", "999-999-9999", "0999 999999", "(999) 999-9999"),
         ("You can reach {s} by telephone at {v}.", "The telephone number of {s} is {v}."),
         ("At what telephone number can {s} be reached?", "What number do I dial to call {s}?"),
         "The telephone number of {s} is {v}."),
    Form(PERSON, _email,
         ("Letters to {s} should go to {v}.", "{s} reads mail that is sent to {v}."),
         ("What is the e-mail address of {s}?", "Where should I send an e-mail for {s}?"),
         "The e-mail address of {s} is {v}."),
    Form(PERSON, _one(TOWNS),
         ("{s} grew up in {v}.", "{s} was born in {v} and stayed there until school was over."),
         ("Where did {s} grow up?", "In which town did {s} spend childhood?"),
         "{s} grew up in {v}."),
    Form(PERSON, _one(INSTRUMENTS),
         ("In the evenings {s} plays the {v}.", "{s} has played the {v} for years."),
         ("Which instrument does {s} play?", "What does {s} play in the evenings?"),
         "{s} plays the {v}."),
    Form(PERSON, _date,
         ("{s} signed the contract on {v}.", "The contract bears the signature of {s}, dated {v}."),
         ("When did {s} sign the contract?", "On what date was the contract signed by {s}?"),
         "{s} signed the contract on {v}."),
    Form(PERSON, PERSON,
         ("{s} shares an office with {v}.", "The person who sits across from {s} is {v}."),
         ("Who shares an office with {s}?", "With whom does {s} share an office?"),
         "{s} shares an office with {v}."),
    Form(PERSON, _dish,
         ("What {s} likes best to eat is {v}.", "At every party {s} asks for {v}."),
         ("What is the favourite dish of {s}?", "Which dish does {s} like best?"),
         "The favourite dish of {s} is {v}."),
    Form(PERSON, _address,
         ("{s} lives at {v}.", "The parcel for {s} was delivered to {v}."),
         ("What is the address of {s}?", "Where does {s} live?"),
         "{s} lives at {v}."),
    Form(PERSON, _written("seat {code}", code=_pattern("99A", "A9", "A99", "9A")),
         ("On the train {s} had {v}.", "{s} booked {v} for the journey."),
         ("Which seat did {s} have?", "Where did {s} sit on the journey?"),
         "{s} had {v}."),
    Form(PERSON, PAIR,
         ("The pseudonym of {s} is {v}.", "{s} publishes under the name of {v}."),
         ("Under which pseudonym does {s} publish?", "What is the pseudonym of {s}?"),
         "The pseudonym of {s} is {v}."),
    Form(PERSON, _phrase,
         ("The recovery phrase that {s} wrote down is {v}.", "{s} chose the recovery phrase {v}."),
         ("What is the recovery phrase of {s}?", "Which recovery phrase did {s} choose?"),
         "The recovery phrase of {s} is {v}."),
    Form(PERSON, _list,
         ("{s} collects {v}.", "In the cellar of {s} there are nothing but {v}."),
         ("What does {s} collect?", "Which three things does {s} collect?"),
         "{s} collects {v}."),
    Form(PERSON, _digits(2, 4),
         ("{s} scored {v} points in the final.", "In the final the jury gave {s} {v} points."),
         ("How many points did {s} score in the final?", "What was the score of {s} in the final?"),
         "{s} scored {v} points in the final."),
    Form(COMPANY, PERSON,
         ("{s} was founded by {v}.", "The founder of {s} was {v}."),
         ("Who founded {s}?", "Who was the founder of {s}?"),
         "{s} was founded by {v}."),
    Form(COMPANY, PERSON,
         ("The accounts of {s} are kept by {v}.", "{v} keeps the books for {s}."),
         ("Who keeps the accounts of {s}?", "Which person is the bookkeeper of {s}?"),
         "The accounts of {s} are kept by {v}."),
    Form(COMPANY, _one(LANDS),
         ("{s} sells most of its goods in {v}.", "The largest market of {s} is {v}."),
         ("In which country does {s} sell most?", "What is the largest market of {s}?"),
         "The largest market of {s} is {v}."),
    Form(COMPANY, _one(TOWNS),
         ("The head office of {s} is in {v}.", "{s} moved its head office to {v}."),
         ("In which town is the head office of {s}?", "Where does {s} have its head office?"),
         "The head office of {s} is in {v}."),
    Form(COMPANY, _grouped,
         ("Last year {s} employed {v} people.", "{s} has a staff of {v}."),
         ("How many people does {s} employ?", "How large is the staff of {s}?"),
         "{s} employs {v} people."),
    Form(COMPANY, _link,
         ("The web site of {s} is {v}.", "{s} takes orders at {v}."),
         ("What is the web site of {s}?", "Where on the web does {s} take orders?"),
         "The web site of {s} is {v}."),
    Form(COMPANY, _pattern("AA99 9999 9999 9999", "999-999-99", "AA 999999999"),
         ("The tax number of {s} is {v}.", "{s} is registered with the tax office as {v}."),
         ("What is the tax number of {s}?", "Under which number is {s} known to the tax office?"),
         "The tax number of {s} is {v}."),
    Form(COMPANY, _written("{n} percent", n=_pattern("9.9", "99", "99.9")),
         ("The share of {s} in the market fell to {v}.", "{s} holds {v} of the market."),
         ("What share of the market does {s} hold?", "How much of the market belongs to {s}?"),
         "{s} holds {v} of the market."),
    Form(PROJECT, PERSON,
         ("{s} is led by {v}.", "The responsibility for {s} lies with {v}."),
         ("Who leads {s}?", "Who is responsible for {s}?"),
         "{s} is led by {v}."),
    Form(PROJECT, _price,
         ("The budget of {s} was cut to {v}.", "For {s} the board granted {v}."),
         ("What is the budget of {s}?", "How much money was granted for {s}?"),
         "The budget of {s} is {v}."),
    Form(PROJECT, _date,
         ("{s} must be finished by {v}.", "The deadline of {s} is {v}."),
         ("When is the deadline of {s}?", "By what date must {s} be finished?"),
         "The deadline of {s} is {v}."),
    Form(PROJECT, PAIR,
         ("Among its members {s} is known as {v}.", "The nickname of {s} is {v}."),
         ("What is the nickname of {s}?", "As what is {s} known among its members?"),
         "The nickname of {s} is {v}."),
    Form(PROJECT, _version,
         ("{s} depends on version {v} of the library.", "The library that {s} needs is version {v}."),
         ("On which version of the library does {s} depend?", "Which version of the library does {s} need?"),
         "{s} depends on version {v} of the library."),
    Form(PROJECT, _pattern("xxxxxxx", "xxxxxxxx", "xxxx-xxxx"),
         ("The last commit of {s} is {v}.", "{s} was tagged at revision {v}."),
         ("What is the last commit of {s}?", "At which revision was {s} tagged?"),
         "The last commit of {s} is {v}."),
    Form(SERVER, _ip,
         ("The address of {s} is {v}.", "On the network {s} answers at {v}."),
         ("What is the network address of {s}?", "At which address does {s} answer?"),
         "The address of {s} is {v}."),
    Form(SERVER, _digits(4, 5),
         ("Connections to {s} go through port {v}.", "The port on which {s} listens is {v}."),
         ("On which port does {s} listen?", "What is the port of {s}?"),
         "The port of {s} is {v}."),
    Form(MACHINE, _pattern("AA999999", "999999-99", "A9-99999"),
         ("The serial number of {s} is {v}.", "On the plate of {s} one reads the serial number {v}."),
         ("What is the serial number of {s}?", "Which serial number is on {s}?"),
         "The serial number of {s} is {v}."),
    Form(MACHINE, PART,
         ("The spare part for {s} is {v}.", "To repair {s}, order part {v}."),
         ("Which part is needed to repair {s}?", "What is the spare part for {s}?"),
         "The spare part for {s} is {v}."),
    Form(MACHINE, _quantity("kilograms", "litres", "watts", "volts", "degrees", "decibels", "tons", "gallons"),
         ("The limit of {s} is {v}.", "No one may load {s} beyond {v}."),
         ("What is the limit of {s}?", "Up to what limit may {s} be loaded?"),
         "The limit of {s} is {v}."),
    Form(MACHINE, PERSON,
         ("The only one who may repair {s} is {v}.", "{v} looks after {s}."),
         ("Who looks after {s}?", "Who may repair {s}?"),
         "{v} looks after {s}."),
    Form(SHIP, _one(TOWNS),
         ("The home port of {s} is {v}.", "In winter one finds {s} at the quay of {v}."),
         ("What is the home port of {s}?", "Where is {s} at home?"),
         "The home port of {s} is {v}."),
    Form(SHIP, PERSON,
         ("The captain of {s} is {v}.", "{s} sails under the command of {v}."),
         ("Who is the captain of {s}?", "Who commands {s}?"),
         "The captain of {s} is {v}."),
    Form(SHIP, _coordinates,
         ("The wreck of {s} lies at {v}.", "Divers found {s} at {v}."),
         ("At which coordinates does {s} lie?", "Where did divers find {s}?"),
         "The wreck of {s} lies at {v}."),
    Form(TRAIN, _time,
         ("At {v} {s} leaves.", "The departure of {s} is at {v}."),
         ("When does {s} leave?", "At what time is the departure of {s}?"),
         "The departure of {s} is at {v}."),
    Form(TRAIN, _written("platform {n}", n=_pattern("9", "99", "9A")),
         ("Today {s} leaves from {v}.", "Passengers for {s} are asked to go to {v}."),
         ("From which platform does {s} leave?", "Which platform is right for {s}?"),
         "{s} leaves from {v}."),
    Form(MUSEUM, _one(DAYS),
         ("Once a week, on {v}, {s} is closed.", "The day on which {s} stays closed is {v}."),
         ("On which day is {s} closed?", "When does {s} stay closed?"),
         "On {v} {s} is closed."),
    Form(MUSEUM, _price,
         ("A ticket for {s} costs {v}.", "At {s} visitors pay {v}."),
         ("How much is a ticket for {s}?", "What do visitors of {s} pay?"),
         "A ticket for {s} costs {v}."),
    Form(MUSEUM, _written("a {thing} of {stuff}", thing=_one(THINGS), stuff=_one(STUFFS)),
         ("The oldest piece in {s} is {v}.", "In its first room {s} shows {v}."),
         ("What is the oldest piece in {s}?", "What does {s} show in its first room?"),
         "The oldest piece in {s} is {v}."),
    Form(BRIDGE, lambda rng: str(rng.integers(1400, 2040)),
         ("In the year {v} {s} was opened.", "The year in which {s} was finished is {v}."),
         ("In which year was {s} opened?", "When was {s} finished?"),
         "In the year {v} {s} was opened."),
    Form(BRIDGE, _quantity("metres", "feet", "yards"),
         ("The length of {s} is given as {v}.", "From end to end {s} measures {v}."),
         ("How long is {s}?", "What is the length of {s}?"),
         "The length of {s} is {v}."),
    Form(_written("the statue of {who}", who=PERSON), _one(STUFFS),
         ("{s} is made of {v}.", "For {s} the sculptor took {v}."),
         ("Of what is {s} made?", "Which material was taken for {s}?"),
         "{s} is made of {v}."),
    Form(_title, PERSON,
         ("The author of {s} is {v}.", "{v} wrote {s}."),
         ("Who wrote {s}?", "Who is the author of {s}?"),
         "The author of {s} is {v}."),
    Form(_title, _pattern("99.9 A", "AA 9999", "A 99.99"),
         ("In the library {s} stands under {v}.", "The shelf mark of {s} is {v}."),
         ("What is the shelf mark of {s}?", "Where in the library does {s} stand?"),
         "The shelf mark of {s} is {v}."),
    Form(_written("the room {name}", name=_one(CODENAMES)), CODE,
         ("The door of {s} opens with {v}.", "Whoever wants to enter {s} types {v}."),
         ("With what does the door of {s} open?", "What must one type to enter {s}?"),
         "The door of {s} opens with {v}."),
    Form(ORDER, _one(TOWNS),
         ("The goods of {s} were sent to {v}.", "The destination of {s} is {v}."),
         ("Where were the goods of {s} sent?", "What is the destination of {s}?"),
         "The goods of {s} were sent to {v}."),
    Form(ORDER, _written("{n} {what}s", n=_digits(2, 4), what=_one(THINGS)),
         ("The content of {s} is {v}.", "With {s} someone asked for {v}."),
         ("What is the content of {s}?", "What was asked for with {s}?"),
         "The content of {s} is {v}."),
    Form(ORDER, _pattern("AA999999999AA", "9A 9999 9999", "99999-99999"),
         ("The tracking number of {s} is {v}.", "To follow {s}, enter {v}."),
         ("What is the tracking number of {s}?", "What do I enter to follow {s}?"),
         "The tracking number of {s} is {v}."),
    Form(_written("the car of {who}", who=PERSON), _pattern("AAA 999", "A 9999 AA", "99-AA-99", "AA99 AAA"),
         ("The plate of {s} reads {v}.", "Witnesses saw {s}, with the number plate {v}."),
         ("What is on the number plate of {s}?", "Which number plate does {s} have?"),
         "The number plate of {s} is {v}."),
    Form(MEETING, _either(_time, _written("{d} at {t}", d=_one(DAYS), t=_time)),
         ("The time of {s} was moved: {v}.", "The time set for {s} is {v}."),
         ("What is the time of {s}?", "What time was set for {s}?"),
         "The time of {s} is {v}."),
    Form(MEETING, _written("room {n}", n=_pattern("999", "A99", "9.99", "A-9")),
         ("The place of {s} is {v}.", "They hold {s} in {v}."),
         ("Where is {s} held?", "In which room is {s}?"),
         "The place of {s} is {v}."),
    Form(_written("the village on the {a} hill", a=_one(QUALITIES)), _grouped,
         ("The population of {s} is {v}.", "At the last count {s} had {v} inhabitants."),
         ("How many people live in {s}?", "What is the population of {s}?"),
         "The population of {s} is {v}."),
    Form(_written("the recipe for {dish}", dish=_dish), _quantity("grams", "cups", "ounces", "spoons"),
         ("Of flour, {s} asks for {v}.", "The amount of flour in {s} is {v}."),
         ("How much flour is in {s}?", "What amount of flour does {s} ask for?"),
         "The amount of flour in {s} is {v}."),
    Form(_written("the keyword for {thing}", thing=_one(THINGS)), PAIR,
         ("Remember that {s} is {v}.", "In the old lists {s} reads {v}."),
         ("What is {s}?", "In the old lists, what is {s}?"),
         "In the lists {s} is {v}."),
)  # fmt: skip

OPENINGS = (
    "Here is a passage. I will ask about it afterwards.\n\n",
    "Please go through the following notes with care.\n\n",
    "I have copied some pages for you.\n\n",
    "Keep what follows in mind, all of it.\n\n",
    "Text:\n",
    "Below is a document.\n---\n",
    "Study these paragraphs; details matter.\n\n",
    "",
)
ASKING = (
    "{q}",
    "{q}",
    "{q}",
    "Question: {q}",
    "According to the text: {q}",
    "Now tell me. {q}",
    "My first question: {q}",
)
AGAIN = ("{q}", "{q}", "Next question: {q}", "And another one. {q}", "Thank you. {q}")


class Fact(NamedTuple):
    """A sentence to hide, a question about it, what to say, and the value that this must hold."""

    sentence: str
    question: str
    answer: str
    value: str


def draw_facts(rng: np.random.Generator, count: int) -> list[Fact]:
    """`count` facts; a third of the time one is of the form of the one before, with another subject and value."""
    facts, form, subjects = [], None, set()
    while len(facts) < count:
        if form is None or rng.random() > 1 / 3:
            form = FORMS[rng.integers(len(FORMS))]
        subject, value = form.subject(rng), form.value(rng)
        if (form.questions, subject) in subjects:
            continue
        subjects.add((form.questions, subject))
        sentence, question = (
            _capital(these[rng.integers(len(these))].format(s=subject, v=value))
            for these in (form.sentences, form.questions)
        )
        # small chat models repeat the question in a sentence; some say less
        whole = _capital(form.answer.format(s=subject, v=value))
        answer = (whole, whole, whole, value, f"It is {value}.")[rng.integers(5)]
        facts.append(Fact(sentence, question, answer, value))
    return facts


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def fact_examples(
    sentences: Sequence[str],
    count_tokens: Callable[[str], int],
    *,
    count: int,
    tokens: tuple[int, int],
    seed: int,
    facts: tuple[int, int] = (2, 8),
) -> Iterator[dict]:
    """Rows for `train.data`: prose with facts hidden at random places, and several questions about them in turn.

    In every other example the prompt is the context alone and all questions come after it, as when a context is
    compressed before anyone asks. In the others the first question stands in the prompt, at its end or, of some, first.

    Args:
      sentences: Prose, in order.
      count_tokens: Text to its number of tokens.
      count: How many.
      tokens: Least and most tokens of a context; short ones are more frequent than long ones.
      seed: Of everything; an example depends on the seed and its number alone.
      facts: Least and most facts of a context. Two to all of them are asked for.

    Yields:
      {"prompt": str, "question": str, "answer": list of str, "values": list of str}. The answer has answer, next
      question, next answer, ...; a value is what an answer must contain, and stands in the prompt; "question" is there
      only where the prompt ends before it.

    Raises:
      ValueError: If there is no prose, or a range is empty.
    """
    if not sentences:
        raise ValueError("facts: sentences is empty; wanted prose to hide facts in.")
    if not 0 < tokens[0] <= tokens[1] or not 0 < facts[0] <= facts[1]:
        raise ValueError(f"facts: tokens={tokens} and facts={facts}; wanted the least and the most of each, from 1 on.")
    lengths: dict[int, int] = {}
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        hidden = draw_facts(rng, int(rng.integers(facts[0], facts[1] + 1)))
        wanted = tokens[0] * math.exp(rng.beta(2, 3) * math.log(tokens[1] / tokens[0]))
        left = wanted - count_tokens(" ".join(fact.sentence for fact in hidden))
        at, parts = int(rng.integers(len(sentences))), []
        while left > 0 or not parts:
            if at not in lengths:
                lengths[at] = count_tokens(" " + sentences[at])
            left -= max(lengths[at], 1)
            parts.append(sentences[at])
            at = (at + 1) % len(sentences)
        for fact in hidden:
            parts.insert(int(rng.integers(len(parts) + 1)), fact.sentence)
        paragraphs = rng.random() < 1 / 2
        gaps = ["\n\n" if paragraphs and rng.random() < 1 / 6 else " " for _ in parts[1:]]
        context = "".join(part for pair in zip(parts, [*gaps, ""], strict=True) for part in pair)
        yield _example(rng, context, hidden, first_in_prompt=bool(i % 2))


def _example(rng: np.random.Generator, context: str, hidden: list[Fact], *, first_in_prompt: bool) -> dict:
    asked = [hidden[i] for i in rng.permutation(len(hidden))[: rng.integers(min(2, len(hidden)), len(hidden) + 1)]]
    opening = OPENINGS[rng.integers(len(OPENINGS))]
    question = ASKING[rng.integers(len(ASKING))].format(q=asked[0].question)
    turns = [asked[0].answer]
    for fact in asked[1:]:
        turns += [AGAIN[rng.integers(len(AGAIN))].format(q=fact.question), fact.answer]
    said = {"answer": turns, "values": [fact.value for fact in asked]}
    if not first_in_prompt:
        return {"prompt": f"{opening}{context}\n\n", "question": question, **said}
    if rng.random() < 1 / 4:
        return {"prompt": f"{question}\n\n{opening}{context}", **said}
    return {"prompt": f"{opening}{context}\n\n{question}", **said}
