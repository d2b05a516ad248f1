"""A structural causal model of recommendation with a known confounder and exact interventional preferences.

Structural equations, for users u, items i, steps t = 1 .. n_u of a user's sequence, all noise independent:

    taste        theta_u ~ Dirichlet(0.3, ..., 0.3) over genres, fixed for the whole sequence
    item         genre g_i, log-popularity a_i = -popularity_exponent * log(rank of i)
    regime       r_t = 0 for the first (1 - shifted_share) of a sequence, then 1
    environment  E_1 ~ pi_0;  E_t = E_{t-1} with probability `persistence`, else drawn from pi_{r_t};
                 drawn anew at the first step of regime 1
    choice       p(Y_t = i | u, E_t = e, not chosen before)
                     proportional to exp(taste_weight * theta_u[g_i] + a_i + strength * 1[i in B(e, r_t)]),
                     B(e, r) the items that environment e boosts in regime r
    history      X_t = (Y_1, ..., Y_{t-1})

With X the prompt (a history) and Y the next item, this is the paper's graph (arXiv 2603.22335, section 3):

    E -> X   the history was chosen under E_1 .. E_{t-1}, which persist, so that it reveals E_t;
    E -> Y   an environment (a season, a campaign) boosts its own items regardless of taste;
    X -> Y   the causal mechanism: the taste theta_u, which drives every choice and which the history stands
             for. theta_u is itself behind X and Y, so all true preferences below are given the user, not only
             the history.

pi_0 falls geometrically (0.50, 0.27, 0.15, 0.08 for four environments). Regime 1, the `environment` shift,
reverses these frequencies and gives every environment a new boosted set, disjoint from its old one; tastes
and popularity stay. Within a regime the boosted sets of two environments share no item.

A model fitted to regime 0 learns p(Y | X) = sum_e p(e | X) p(Y | u, e). Cutting E -> X leaves Eq. 6,

    p(Y | do(X), u) = sum_e p(e) p(Y | u, e),

which is `SimulatedTruth.interventional`. It and `SimulatedTruth.choice_probabilities` range over the whole
catalogue: they leave out the rule that nobody chooses an item twice, which the data obey only so that all
(user, item) pairs differ. That rule wears out a user's favourites: late choices, regime 1 among them, are
harder to predict even at strength 0, so compare methods within a test split, not the levels of two splits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from causaldpo_lib.data.interactions import Interactions, counts
from causaldpo_lib.errors import StudyError

FREQUENCY_RATIO = 0.55  # of an environment's frequency to the next more frequent one's
TASTE_CONCENTRATION = 0.3  # of the Dirichlet distribution: a user likes two or three genres
START = 1_577_836_800  # 2020-01-01 in Unix seconds
SPAN = 300 * 86_400  # seconds from the first to the last interaction

# Adjectives and nouns of each genre. No word is shared, so that a title reveals its genre.
LEXICONS: dict[str, tuple[str, str]] = {
    "Space": (
        "Rusted Silent Orbital Distant Lunar Stellar Drifting Frozen Solar Radiant Cosmic Hollow",
        "Comet Colony Nebula Signal Rocket Station Planet Asteroid Voyager Galaxy Satellite Eclipse Pulsar Horizon",
    ),
    "Romance": (
        "Tender Secret Parisian Summer Borrowed Blushing Faithful Moonlit Second Velvet Reckless Sweet",
        "Letter Wedding Kiss Promise Valentine Waltz Bouquet Heart Proposal Embrace Sonnet Affair Bride Serenade",
    ),
    "Crime": (
        "Crooked Midnight Stolen Guilty Loaded Bribed Masked Wanted Perfect Corrupt Nameless Smoking",
        "Witness Alibi Detective Heist Verdict Informant Gangster Ransom Suspect Forger Motive Warden Vault Sting",
    ),
    "Horror": (
        "Haunted Bleeding Whispering Cursed Buried Screaming Ghastly Rotten Sleepless Possessed Gruesome Eerie",
        "Cellar Coffin Scarecrow Asylum Graveyard Mirror Phantom Doll Attic Vampire Scream Crypt Werewolf Shadow",
    ),
    "Western": (
        "Dusty Lonesome Outlaw Bitter Sunburnt Wild Silver Galloping Thirsty Rugged Branded Stubborn",
        "Saloon Sheriff Canyon Stagecoach Rustler Prairie Ranch Gunslinger Posse Mustang Spur Showdown Drifter Corral",
    ),
    "Comedy": (
        "Clumsy Ridiculous Awkward Giggling Accidental Hopeless Nervous Unlikely Tipsy Grumpy Silly Confused",
        "Butler Roommate Neighbor Plumber Uncle Holiday Landlord Tourist Dentist Impostor Referee Mascot Waiter Cousin",
    ),
    "Fantasy": (
        "Enchanted Golden Elven Forgotten Emerald Winged Ancient Mystic Crystal Thorned Runic Immortal",
        "Dragon Sorcerer Kingdom Amulet Prophecy Unicorn Goblin Tower Oracle Sword Throne Grimoire Griffin Quest",
    ),
    "Sport": (
        "Final Unbeaten Underdog Sprinting Barefoot Fearless Rookie Champion Muddy Veteran Undersized Tireless",
        "Sprinter Goalkeeper Boxer Relay Marathon Tournament Pitcher Coach Penalty Rower Overtime Stadium Jockey Medal",
    ),
    "War": (
        "Broken Marching Besieged Occupied Retreating Wounded Burning Loyal Captured Armored Abandoned Sunken",
        "Regiment Trench Battalion Admiral Bunker Soldier Convoy Bridge Armistice Bomber Submarine Medic Flag Garrison",
    ),
    "Music": (
        "Electric Acoustic Harmonic Offbeat Syncopated Vinyl Humming Jazzy Unplugged Melodic Roaring Bluesy",
        "Trumpet Drummer Ballad Orchestra Songbird Encore Guitar Chorus Pianist Tango Fiddle Melody Rhapsody Jukebox",
    ),
}
SEQUELS = ("", " II", " III")


@dataclass(frozen=True)
class SimulatedTruth:
    """The causal model behind a simulated dataset (U users, I items, E environments, G genres, 2 regimes).

    Attributes:
        users: (U,) ids. items: (I,) ids; every other array is in these orders.
        taste: (U, G), rows sum to one. genre: (I,) column of ``taste``. log_popularity: (I,).
        taste_weight: log-odds per unit of taste. strength: log-odds added to a boosted item.
        environment_frequency: (2, E), rows sum to one: how often each environment occurs in each regime.
        boosted: (2, E, I) bool, the items each environment boosts in each regime.
    """

    users: np.ndarray
    items: np.ndarray
    taste: np.ndarray
    genre: np.ndarray
    log_popularity: np.ndarray
    taste_weight: float
    strength: float
    environment_frequency: np.ndarray
    boosted: np.ndarray

    def logits(self) -> np.ndarray:
        """(U, I) log-odds of the choices without any environment: taste and popularity."""
        return self.taste_weight * self.taste[:, self.genre] + self.log_popularity

    def choice_probabilities(self, environment: int, regime: int = 0) -> np.ndarray:
        """(U, I) p(item | user, environment) in a regime, over the whole catalogue; rows sum to one."""
        logits = self.logits() + self.strength * self.boosted[regime, environment]
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True)

    def interventional(self, regime: int = 0) -> pd.DataFrame:
        """p(item | do(history), user) = sum_e p(e) p(item | user, e), the paper's Eq. 6, at a regime's p(e).

        Returns:
            (U, I), indexed by user id, columns are item ids; rows sum to one. The same for all histories.
        """
        frequency = self.environment_frequency[regime]
        mixture = sum(p * self.choice_probabilities(e, regime) for e, p in enumerate(frequency))
        return pd.DataFrame(mixture, index=pd.Index(self.users, name="user"), columns=pd.Index(self.items, name="item"))


def simulate(
    *,
    users: int = 600,
    items: int = 300,
    genres: int = 8,
    length: int = 30,
    environments: int = 4,
    strength: float = 2.0,
    taste_weight: float = 4.0,
    popularity_exponent: float = 0.6,
    persistence: float = 0.9,
    boosted_share: float = 0.1,
    shifted_share: float = 0.2,
    seed: int = 0,
) -> Interactions:
    """Interactions drawn from the structural causal model of this module; see there for the equations.

    Every part has its own random stream: changing ``strength`` alone keeps titles, tastes and environments as
    they were. All of regime 0 lies before all of regime 1 in time; times are strictly increasing within a
    user.

    Args:
        users, items, genres, environments: how many. genres: at most ten.
        length: mean interactions a user (gamma distributed, at least a third and at most thrice of it, and
            never more than half of the catalogue).
        strength: log-odds boost of an environment's items; 0: no confounding.
        taste_weight: log-odds between a genre of taste one and a genre of taste zero.
        popularity_exponent: of the power law of popularity over ranks; 0: all items equally popular.
        persistence: probability that a step keeps its environment without a new draw.
        boosted_share: share of the catalogue that one environment boosts.
        shifted_share: share of every sequence that belongs to regime 1.
        seed: of everything.

    Returns:
        ``table`` with ``environment`` and ``regime`` beside user, item, rating (always 5.0) and time;
        ``truth``.

    Raises:
        StudyError: an option outside its range.
    """
    _check_ranges(locals())
    streams = [np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(6)]
    catalogue_rng, title_rng, user_rng, boost_rng, environment_rng, choice_rng = streams

    genre = catalogue_rng.permutation(np.arange(items) % genres)
    rank = 1 + catalogue_rng.permutation(items)
    frequency = FREQUENCY_RATIO ** np.arange(environments)
    frequency /= frequency.sum()
    truth = SimulatedTruth(
        users=np.arange(1, users + 1),
        items=np.arange(1, items + 1),
        taste=user_rng.dirichlet(np.full(genres, TASTE_CONCENTRATION), size=users),
        genre=genre,
        log_popularity=-popularity_exponent * np.log(rank),
        taste_weight=taste_weight,
        strength=strength,
        environment_frequency=np.stack([frequency, frequency[::-1]]),
        boosted=_boosted_sets(environments, items, int(boosted_share * items + 1e-9), boost_rng),
    )

    lengths = _lengths(users, items, length, user_rng)
    changes = lengths - np.rint(shifted_share * lengths).astype(int)  # first step of regime 1
    environment = _environments(changes, int(lengths.max()), truth.environment_frequency, persistence, environment_rng)
    regime = (np.arange(lengths.max()) >= changes[:, None]).astype(int)
    chosen = _choices(truth, lengths, environment, regime, choice_rng)
    time = _times(lengths, changes, shifted_share, user_rng)

    row, step = np.nonzero(np.arange(lengths.max()) < lengths[:, None])  # by user, then by step
    table = pd.DataFrame(
        {
            "user": truth.users[row],
            "item": truth.items[chosen[row, step]],
            "rating": 5.0,
            "time": time[row, step],
            "environment": environment[row, step],
            "regime": regime[row, step],
        }
    )
    names = list(LEXICONS)[:genres]
    catalogue = pd.DataFrame(
        {"item": truth.items, "title": _titles(genre, names, title_rng), "genres": [names[g] for g in genre]}
    )
    stats = counts(rows_read=len(table), items_listed=items)
    return Interactions("simulated", table, catalogue, stats, truth=truth)


def _check_ranges(options: Mapping[str, Any]) -> None:
    genres, environments = options["genres"], options["environments"]
    titles = genres * len(SEQUELS) * min(len(a.split()) * len(n.split()) for a, n in LEXICONS.values())
    most = 1 / (environments + 1)  # one set more than environments, to redraw the last without its old items
    ranges = {
        "users": (1, np.inf),
        "genres": (1, len(LEXICONS)),
        "items": (10, titles),  # titles differ
        "length": (3, np.inf),
        "environments": (1, np.inf),
        "persistence": (0, 1),
        "strength": (0, np.inf),
        "boosted_share": (1 / options["items"], most),
        "shifted_share": (0, 0.9),
        "seed": (0, np.inf),
    }
    for name, (low, high) in ranges.items():
        if not low <= options[name] <= high:
            limits = f"at least {low:g}" if high == np.inf else f"between {low:.4g} and {high:.4g}"
            raise StudyError(f"option {name!r} of dataset 'simulated' must be {limits}, not {options[name]}")


def _boosted_sets(environments: int, items: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """(2, E, I): disjoint random sets of ``size`` items in each regime; no environment keeps an old item."""
    boosted = np.zeros((2, environments, items), dtype=bool)
    for regime in (0, 1):
        for environment in range(environments):
            taken = boosted[regime].any(axis=0) | boosted[0, environment]
            boosted[regime, environment, rng.choice(np.flatnonzero(~taken), size, replace=False)] = True
    return boosted


def _lengths(users: int, items: int, mean: int, rng: np.random.Generator) -> np.ndarray:
    drawn = np.rint(rng.gamma(4.0, mean / 4.0, size=users)).astype(int)
    return np.minimum(np.clip(drawn, max(3, mean // 3), 3 * mean), items // 2)


def _environments(
    changes: np.ndarray, steps: int, frequency: np.ndarray, persistence: float, rng: np.random.Generator
) -> np.ndarray:
    """(U, steps), a Markov chain a user: a step copies the last fresh draw, made at its regime's odds."""
    shape = (len(changes), steps)
    step = np.arange(steps)
    draws = np.stack([rng.choice(frequency.shape[1], size=shape, p=p) for p in frequency])
    draws = np.where(step < changes[:, None], draws[0], draws[1])
    fresh = (rng.random(shape) >= persistence) | (step == 0) | (step == changes[:, None])
    last_fresh = np.maximum.accumulate(np.where(fresh, step, 0), axis=1)
    return np.take_along_axis(draws, last_fresh, axis=1)


def _choices(
    truth: SimulatedTruth,
    lengths: np.ndarray,
    environment: np.ndarray,
    regime: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """(U, steps) item positions, drawn step by step for all users at once by the Gumbel-max trick."""
    logits = truth.logits()  # an item chosen once gets minus infinity here
    chosen = np.full(environment.shape, -1)
    for step in range(environment.shape[1]):
        active = np.flatnonzero(step < lengths)
        boost = truth.strength * truth.boosted[regime[active, step], environment[active, step]]
        pick = np.argmax(logits[active] + boost + rng.gumbel(size=boost.shape), axis=1)
        chosen[active, step] = pick
        logits[active, pick] = -np.inf
    return chosen


def _times(lengths: np.ndarray, changes: np.ndarray, shifted_share: float, rng: np.random.Generator) -> np.ndarray:
    """(U, steps) Unix seconds: sittings of minutes, days apart, within a stretch of the regime's period."""
    steps = int(lengths.max())
    step = np.arange(steps)
    shape = (len(lengths), steps)
    gap = np.where(rng.random(shape) < 0.2, rng.exponential(3 * 86_400, shape), rng.exponential(300, shape))
    begin, end = np.sort(rng.random((2, 2, len(lengths))), axis=0)  # (2, U): of each regime's stretch
    boundary = int((1 - shifted_share) * SPAN)
    time = np.zeros(shape, dtype=np.int64)
    for regime, (start, stop) in enumerate(((0, boundary), (boundary, SPAN))):
        inside = (step < lengths[:, None]) & ((step >= changes[:, None]) == bool(regime))
        passed = np.cumsum(np.where(inside, gap, 0.0), axis=1)
        share = passed / np.maximum(passed.max(axis=1, keepdims=True), 1e-9)
        room = max(stop - start - steps, 0)  # the step itself is added below, which keeps times apart
        scaled = begin[regime][:, None] + (end - begin)[regime][:, None] * share
        time = np.where(inside, START + start + (scaled * room).astype(np.int64) + step, time)
    return time


def _titles(genre: np.ndarray, names: list[str], rng: np.random.Generator) -> np.ndarray:
    """(I,) distinct titles 'Adjective Noun', some with article; sequels when all pairs are used up."""
    titles = np.empty(len(genre), dtype=object)
    for code, name in enumerate(names):
        adjectives, nouns = (words.split() for words in LEXICONS[name])
        pairs = [f"{adjective} {noun}" for adjective in adjectives for noun in nouns]
        articles = rng.choice(["The ", ""], size=len(pairs))
        bases = [article + pair for article, pair in zip(articles, rng.permutation(pairs), strict=True)]
        places = np.flatnonzero(genre == code)
        titles[places] = [base + sequel for sequel in SEQUELS for base in bases][: len(places)]
    return titles
