"""The diagram of docs/design.md: the folders of the package, and which imports which."""

import ast
import textwrap
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "deepfeat"
PICTURE = ROOT / "docs/_static/rooms.svg"
DOOR = "__init__"

WIDTH, WIDEST, MARGIN, GAP, RISE, TITLE, LINE, CHARACTER = 900, 380, 12, 16, 36, 30, 16, 7


def find_rooms():
    """Return the files of each room; a module at the top is a room of its own."""
    rooms = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        room, *rest = path.relative_to(PACKAGE).with_suffix("").parts
        rooms.setdefault(room, [])
        rooms[room] += [name for name in rest if name != "__init__"]
    return rooms


def find_imports(rooms):
    """Return the rooms that each room imports, also inside functions and for types alone."""
    imports = {room: set() for room in rooms}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                base = parts[: len(parts) - node.level] if node.level else ()
                source = [*base, *(node.module or "").split(".")]
                names = [".".join(filter(None, [*source, alias.name])) for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            for name in names:
                root, _, rest = name.partition(".")
                if root == PACKAGE.name:
                    room = rest.partition(".")[0]
                    imports[parts[1]].add(room if room in rooms else DOOR)
    imports[DOOR].discard("plotting")  # a guest, of which the door knows only the name
    return {room: sorted(used - {room}) for room, used in imports.items()}


def find_floors():
    """Return the rooms of each floor from the top, as the contracts of pyproject.toml have them."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    floors = contracts["contracts"][0]["layers"]
    split = [[room.strip() for room in floor.replace("|", ":").split(":")] for floor in floors]
    behind = next(number for number, rooms in enumerate(split) if rooms[0].startswith("_"))
    return [*split[:behind], [DOOR], *split[behind:]]


def leave_out_implied(imports):
    """Leave out each arrow that a longer way along others implies."""

    def reach(room):
        return {room}.union(*(reach(used) for used in imports[room]))

    return [
        (room, used)
        for room, direct in imports.items()
        for used in direct
        if not any(used in reach(other) for other in direct if other != used)
    ]


def draw():
    """Draw the floors as rows of boxes, with arrows from each to what it imports, as SVG."""
    rooms, floors = find_rooms(), find_floors()
    boxes, texts, top = {}, {}, MARGIN
    for floor in floors:
        width = min(WIDEST, (WIDTH - GAP) / len(floor) - GAP)
        left = (WIDTH - len(floor) * (width + GAP) + GAP) / 2
        for room in floor:
            texts[room] = textwrap.wrap(", ".join(rooms[room]), int(width / CHARACTER))
        height = TITLE + LINE * max(len(texts[room]) for room in floor) + LINE / 2
        for number, room in enumerate(floor):
            boxes[room] = left + number * (width + GAP), top, width, height
        top += height + RISE
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top - RISE + MARGIN:g}" '
        'font-family="sans-serif" font-size="14">',
        "<title>The folders of deepfeat: each imports only from the floors below its own</title>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" '
        'markerHeight="8" orient="auto"><path d="M0 0L8 4L0 8z" fill="#777"/></marker></defs>',
        f'<rect width="{WIDTH}" height="100%" rx="8" fill="#fff"/>',
    ]
    for room, used in leave_out_implied(find_imports(rooms)):
        if used in floors[-1]:  # the ground, on which all stand
            continue
        (left, above, width, height), (to_left, below, to_width, _) = boxes[room], boxes[used]
        lines.append(
            f'<path d="M{left + width / 2:g} {above + height:g}L{to_left + to_width / 2:g} '
            f'{below:g}" stroke="#777" fill="none" marker-end="url(#head)"/>'
        )
    for room, (left, above, width, height) in boxes.items():
        middle = left + width / 2
        lines += [
            f'<rect x="{left:g}" y="{above:g}" width="{width:g}" height="{height:g}" rx="4" '
            'fill="#eef3fa" stroke="#4a6fa5"/>',
            f'<text x="{middle:g}" y="{above + 20:g}" text-anchor="middle" font-weight="bold" '
            f'fill="#123">{"deepfeat" if room == DOOR else room}</text>',
        ]
        lines += [
            f'<text x="{middle:g}" y="{above + TITLE + LINE * number + 12:g}" '
            f'text-anchor="middle" font-size="12" fill="#345">{names}</text>'
            for number, names in enumerate(texts[room])
        ]
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
