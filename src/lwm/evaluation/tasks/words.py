"""What is drawn by chance for keys and lists: UUIDs and English words; further words come from the
text at hand, or are compounds.
"""

import re
import uuid
from collections.abc import Iterator, Sequence
from random import Random

_ADJECTIVES = """
able aged agile airy alert ample amber ancient angry arctic ashen autumn awake azure bald bare
basic bitter blank bland bleak blind blond blue blunt bold boiled bony brave brief bright brisk
broad broken brown calm careful cautious cheap cheerful chilly civil clean clear clever close
cloudy coarse cold common cool copper coral costly crisp crooked cruel curious curly damp daring
dark dear decent deep dense dim direct distant dizzy double dreary dry dull dusty eager early easy
eastern elder empty equal exact extra faint fair famous fancy fast feeble fertile fierce final
fine firm flat fluffy fond formal frail free fresh frozen full funny gentle giant glad gloomy
golden grand grateful gray great greedy green grim handy happy hard harsh heavy hidden hollow holy
honest hot huge humble hungry icy idle inner iron ivory jolly keen kind large late lazy lean level
light limp little lively local lonely long loose loud loyal lucky mad major mellow merry mighty
mild minor misty modern modest muddy narrow naval neat nervous new nice nimble noble noisy
northern odd old open orange outer pale patient plain polite poor precious pretty prompt proud
pure purple quick quiet rapid rare raw ready real red rich rigid ripe rough round royal rude rusty
sacred sad safe salty scarce secret severe shady shallow sharp shiny short shy silent silver
simple sincere single sleepy slim slow small smart smooth sober soft solar solid sore sour spare
steady steep stern stiff still stout strange strict strong sturdy subtle sudden sunny sweet swift
tall tame tart tender thick thin thirsty tidy tight timid tiny tired tough tragic true upper urban
usual vague vain vast velvet violet vivid warm wary weak wealthy western wet white whole wicked
wide wild wise wooden woolen worthy yellow young
"""

_NOUNS = """
acorn actor anchor angle animal ankle answer apron arch arena arrow artist atlas attic aunt author
avenue badge baker balloon banjo banner barley barn barrel basin basket battle beach beacon bean
beard beaver bell belt bench berry bicycle bird biscuit blanket blossom boat bolt bonnet book boot
border bottle bowl branch bread breeze brick bridge broom brush bubble bucket buckle butter button
cabbage cabin cable cactus camel camera camp canal candle canoe canvas canyon captain caravan
carpet carriage carrot castle cattle cave cedar cellar chain chair chapel chart cherry chimney
circle cliff clock cloak cloud clover coast cobra coffee collar column comet compass copy cottage
cotton couch cousin cradle crane crater creek cricket crow crown crystal cup curtain cushion dairy
daisy dancer dawn deer desert desk diamond dinner dolphin donkey door dragon drawer dream drum
duck eagle echo elbow elephant elm ember emperor engine envelope falcon farmer feather fence
fender fern ferry fiddle field finger flag flame flower flute forest fork fountain fox frame frog
funnel galaxy gallery garlic gate ginger giraffe glacier glove goat grape grass gravel grove
guitar hammer hammock harbor harp hawk hazel heart hedge helmet hermit heron hill hinge honey hood
horizon hornet horse hotel hunter island jacket jar jewel jungle juniper kettle kite kitten knee
knight ladder lake lamp lantern lawyer leaf ledge lemon letter library lily lion lizard lobster
locket lumber magnet mango maple marble market mask meadow melon mercury meteor mill miner mirror
mitten monkey moon moss motor mountain mouse museum mushroom napkin needle nephew nest night
notebook nurse oak oasis ocean olive onion orbit orchard organ otter oven owl oyster paddle palace
panther paper parade parcel parrot pasture path peach peanut pear pearl pebble pelican pencil
pepper piano picture pigeon pillar pillow pilot pine pirate planet plank plate plum pocket pony
poplar porch potato prairie prince puddle pumpkin puppet quarry queen quilt rabbit radish raft
railway rain raven ribbon rice ring river road robin rocket roof root rope rose saddle sailor
salmon sand satchel scarf school scissors seal season shadow sheep shelf shell ship shoe shovel
shower silk singer skate sled slipper snail snow soap soldier sparrow spider spoon spring squirrel
stable star statue stone stool storm stove stream street summit swallow swan sword table tailor
temple tent thistle thread thunder tiger timber tin toad torch tower trail train tray treasure
tree trumpet tulip tunnel turtle uncle valley vase village vine violin wagon walnut water weaver
whale wheat wheel whistle willow window winter wolf wool worm yacht zebra
"""

ADJECTIVES, NOUNS = tuple(_ADJECTIVES.split()), tuple(_NOUNS.split())

_PLAIN = re.compile(r"[a-z]{3,12}")


def compound(random: Random) -> str:
    """An adjective and a noun, joined as in `crooked-lantern`."""
    return f"{random.choice(ADJECTIVES)}-{random.choice(NOUNS)}"


def random_uuid(random: Random) -> str:
    return str(uuid.UUID(int=random.getrandbits(128), version=4))


def plain_words(words: Sequence[str]) -> list[str]:
    """Ours and those of a text, each once, ascending: lower-case, of 3 to 12 letters."""
    found = {word for word in set(words) if _PLAIN.fullmatch(word)}
    return sorted(found.union(ADJECTIVES, NOUNS))


def different(random: Random, pool: Sequence[str]) -> Iterator[str]:
    """Words without end, none twice: those of a pool in some order, or where it is empty or
    through, compounds."""
    yield from random.sample(pool, len(pool))
    given: set[str] = set()
    while True:
        word = compound(random)
        while word in given:
            word = f"{random.choice(ADJECTIVES)}-{word}"
        given.add(word)
        yield word
