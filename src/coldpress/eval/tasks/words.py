"""Our own words and sentences, that tasks are made of where no text is given."""

from __future__ import annotations

__all__ = ["ADJECTIVES", "NOUNS", "SENTENCES"]

# No two of them are the same idea, none holds a number or a word of ADJECTIVES or NOUNS, and any order will do.
SENTENCES = (
    "The ferry left the quay before the fog had gone.",
    "Nobody in the village remembered who had planted the row of limes.",
    "She folded the letter twice and put it under the clock.",
    "Rain had softened the path that leads down to the mill.",
    "In the evening the children counted the boats as they came home.",
    "The baker opened late, because his daughter was getting married.",
    "From the hill one could see both rivers and the road between them.",
    "He said little, and what he said he had thought about.",
    "The old school now belongs to a man who repairs pianos.",
    "When the bells were taken away, people learnt to look at the sun.",
    "There was always somebody at the window of the corner house.",
    "The harvest was poor that year, and the winter was long.",
    "A train went by, and for a moment all of them stopped talking.",
    "They had painted the door green, then blue, then green again.",
    "The doctor came on foot, since the horse was lame.",
    "Some of the books had been read so often that they fell apart.",
    "On market days the square smelt of apples and wet wool.",
    "Her brother wrote seldom, but he never forgot a birthday.",
    "The path to the lake was shorter than it looked on the map.",
    "After supper they moved the chairs outside and waited for the stars.",
    "The judge listened with closed eyes, as he did every Tuesday.",
    "It was too warm for a coat and too cold to go without one.",
    "The bridge shook a little whenever a cart went over it.",
    "No one could say why the fountain had stopped.",
    "The teacher kept a jar of pebbles on the desk.",
    "Snow lay on the roofs long after it had melted in the fields.",
    "The tailor measured everything by eye and was hardly ever wrong.",
    "In spring the river carried branches from places they had never seen.",
    "A dog slept in the middle of the street, and the carts went round it.",
    "They sang the same songs as their grandparents, only faster.",
    "The inn had many rooms, but the guests all wanted the same one.",
    "Towards noon the wind turned, and the smoke went out to sea.",
)

ADJECTIVES = (
    *("amber", "brisk", "clever", "dusty", "eager", "fancy", "gentle", "hollow", "icy", "jolly", "keen", "lively"),
    *("mellow", "noble", "odd", "polite", "quiet", "rapid", "silent", "tender", "urgent", "vivid", "witty", "young"),
    *("bitter", "calm", "dizzy", "famous", "golden", "humble", "proud", "rough", "shiny", "tiny", "velvet", "wild"),
)

NOUNS = (
    *("anchor", "basket", "candle", "dragon", "engine", "falcon", "garden", "hammer", "island", "jacket", "kettle"),
    *("lantern", "mirror", "needle", "orange", "pencil", "quilt", "rabbit", "saddle", "turtle", "umbrella", "violin"),
    *("walnut", "zebra", "arrow", "button", "camel", "desert", "eagle", "feather", "giant", "helmet", "insect"),
    *("jungle", "kitten", "ladder", "magnet", "napkin", "ocean", "parrot", "queen", "ribbon", "spider", "temple"),
    *("uncle", "valley", "whistle", "yogurt", "acorn", "barrel", "castle", "dolphin", "elbow", "forest", "guitar"),
    *("hotel", "iron", "jewel", "knife", "lemon", "monkey", "nest", "onion", "pillow", "rocket", "sugar", "tunnel"),
    *("vase", "wagon", "bread", "cloud", "drum", "flag", "glove", "honey", "ink", "lamp", "moon", "pepper", "ring"),
)
