"""Every file of a source folder is taken or counted, and no class loses pictures without a word."""

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import event, given, strategies as st

from cxr_dist.cli import main
from tests.tfrecords_builder.conftest import write_images
from tfrecords_builder.build import BuildOptions, build_dataset
from tfrecords_builder.collection.collect import find_images
from tfrecords_builder.collection.file_kinds import Note, Reason, not_taken_lines, printable, suffix_of
from tfrecords_builder.collection.find import Listing, list_source
from tfrecords_builder.collection.layout import recognise, sort_files
from tfrecords_builder.collection.scan import scan
from tfrecords_builder.common.errors import UserError
from tfrecords_builder.format.manifest import read_manifest
from tfrecords_builder.images.decoded import ImageError

PNG = b"\x89PNG\r\n\x1a\n"
HEIC = b"\0\0\0\x18ftypheic"
CLASSES = {"COVID": 12, "Lung_Opacity": 12, "Normal": 12, "Viral_Pneumonia": 12}


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """Four classes of twelve images each, directly in the class folders."""
    return write_images(tmp_path / "source", CLASSES, database_layout=False)


def pngs(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.png"))


def rename(files: list[Path], suffix: str) -> None:
    """Pictures in a format that nobody reads."""
    for file in files:
        file.write_bytes(HEIC)
        file.rename(file.with_suffix(suffix))


def counts(listing: Listing) -> dict[tuple[str, Reason, str], int]:
    return {(item.folder, item.reason, item.suffix): item.files for item in listing.not_taken}


def taken(listing: Listing) -> int:
    return len(listing.images) + len({image.mask for image in listing.images if image.mask})


def files_below(root: Path) -> int:
    """Files, and links to folders: what an independent walk finds that is no real folder."""
    return sum(
        len(files) + sum(Path(folder, name).is_symlink() for name in folders)
        for folder, folders, files in os.walk(root)
    )


# Every file is accounted for

NAMES = (
    "a.png",
    "b.JPG",
    "c.heic",
    "a_mask.png",
    "mask_a.jpg",
    "noend",
    ".hidden",
    "Thumbs.db",
    "x.csv",
    "metadata.csv",
    "d.nii",
)
FOLDERS = ("", "images", "Images", "masks", "p1", "p1/deep", ".git", "__MACOSX", "masks/inner")
TOPS = ("", "A", "B", "docs", ".cache", "masks")
LINKS = ("a.png", "../B/a.png", "nowhere.png", ".", "..", "images", "../A")


Tree = list[tuple[str, str | None]]


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    """Paths of files (None) and of links (with their targets)."""
    place = st.tuples(st.sampled_from(TOPS), st.sampled_from(FOLDERS))
    files = draw(st.lists(st.tuples(place, st.sampled_from(NAMES), st.none()), max_size=25))
    names = st.sampled_from(("l.png", "l", "images", "l.heic"))
    links = draw(st.lists(st.tuples(place, names, st.sampled_from(LINKS)), max_size=5))
    # Mostly of folders that are classes for sure: others are soon an error.
    sure: Tree = [("A/x.png", None), ("B/x.png", None), ("docs/x.txt", None)] if draw(st.integers(0, 3)) else []
    return sure + [("/".join(filter(None, (*where, name))), target) for where, name, target in [*files, *links]]


def plant(root: Path, tree: Tree) -> None:
    """The files and links of a tree, but for those in whose way another one is."""
    for path, target in tree:
        file = root / path
        if os.path.lexists(file) or not os.path.realpath(file).startswith(os.path.realpath(root) + os.sep):
            continue
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if target is None:
            file.write_bytes(PNG)
        else:
            file.symlink_to(target)


@given(trees())
def test_taken_and_counted_files_are_all_files(tree: Tree) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "source"  # above it is nothing that a link could lead to
        root.mkdir()
        plant(root, tree)
        walk = scan(root)
        files = sort_files(walk, recognise(walk))
        folders = [files.loose, *files.folders.values()]
        paths = [path for folder in folders for path in (*folder.images, *folder.masks)]
        counted = sum(item.files for folder in folders for item in folder.not_taken)
        assert len(paths) == len(set(paths))
        assert len(paths) + counted == files_below(root)
        try:
            listings = [list_source(root, "skip", masks) for masks in ("read", "ignore")]
        except UserError:
            event("refused")
            return
        for listing in listings:
            assert taken(listing) + sum(item.files for item in listing.not_taken) == files_below(root)
        real = Counter(os.path.realpath(root / image.path) for image in listing.images)
        for path, times in real.items():
            classes = {image.class_name for image in listing.images if os.path.realpath(root / image.path) == path}
            assert times == len(classes), "no image is taken twice into one class"


def test_known_leftovers_change_nothing_and_are_counted(tmp_path: Path) -> None:
    source = write_images(tmp_path / "source", CLASSES)
    clean = build_dataset(source, tmp_path / "d", BuildOptions(image_size=16, workers=1)).manifest
    assert clean.not_taken == ()
    leftovers = {
        ".DS_Store": Reason.HIDDEN,
        "COVID/.DS_Store": Reason.HIDDEN,
        "COVID/images/._COVID-1.png": Reason.HIDDEN,
        "COVID/.ipynb_checkpoints/COVID-1-checkpoint.png": Reason.HIDDEN,
        "__MACOSX/COVID/._COVID-1.png": Reason.SYSTEM,
        "COVID/images/Thumbs.db": Reason.SYSTEM,
        "COVID/desktop.ini": Reason.SYSTEM,
        "lost+found/x": Reason.SYSTEM,
        "README.md.txt": Reason.DOCUMENT,
        "LICENSE": Reason.DOCUMENT,
        "docs/paper.pdf": Reason.DOCUMENT,
        "COVID/sizes.xlsx": Reason.DOCUMENT,
    }
    for path in leftovers:
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes(PNG)
    again = build_dataset(source, tmp_path / "d", BuildOptions(image_size=16, workers=1))
    assert again.reused, "the dataset is the same"
    assert again.manifest.fingerprint == clean.fingerprint
    for manifest in (again.manifest, read_manifest(tmp_path / "d")):
        found = Counter[Reason]()
        for item in manifest.not_taken:
            found[item.reason] += item.files
        assert found == Counter(leftovers.values())
        assert manifest.rows == clean.rows
    [line] = not_taken_lines(again.manifest.not_taken)
    assert line.startswith("other files: 12 (hidden files: 4, files of the operating system: 4, documents: 4")


# A class that would lose pictures


def to_heic(source: Path) -> None:
    rename(pngs(source / "COVID"), ".HEIC")


def to_heic_in_images(source: Path) -> None:
    (source / "COVID" / "images").mkdir()
    for file in pngs(source / "COVID"):
        file.rename(source / "COVID" / "images" / file.name)
    to_heic(source)


def to_nifti(source: Path) -> None:
    for file in pngs(source / "COVID"):
        file.rename(file.with_suffix(".nii.gz"))


def to_gif_without_suffix(source: Path) -> None:
    for file in pngs(source / "COVID"):
        file.with_name(f"1.2.840.{file.stem.rpartition('-')[2]}").write_bytes(b"GIF89a")
        file.unlink()


def to_no_suffix(source: Path) -> None:
    for file in pngs(source / "COVID"):
        file.rename(file.with_suffix(""))


def to_annex(source: Path) -> None:
    for file in pngs(source / "COVID"):
        file.unlink()
        file.symlink_to(f"../.git/annex/objects/{file.name}")


def to_itself(source: Path) -> None:
    for file in pngs(source / "COVID"):
        file.unlink()
        file.symlink_to(file.name)


def to_unmounted(source: Path) -> None:
    shutil.rmtree(source / "COVID")
    (source / "COVID").symlink_to("/nowhere/COVID")


@pytest.mark.parametrize(
    ("change", "words", "fix"),
    [
        (to_heic, "COVID 12 of 12 (12 .heic: images in another format)", "convert"),
        (to_heic_in_images, "COVID 12 of 12 (12 .heic: images in another format)", "convert"),
        (to_nifti, "COVID 12 of 12 (12 .nii: images in another format)", "convert"),
        (to_gif_without_suffix, "COVID 12 of 12 (12 without suffix: images in another format)", "convert"),
        (to_no_suffix, f"COVID 12 of 12 (12 without suffix: {Reason.UNNAMED})", "suffix"),
        (to_annex, "COVID 12 of 12 (12 .png: links to nothing)", "git annex get"),
        (to_itself, "COVID 12 of 12 (12 .png: links to nothing)", "git annex get"),
        (to_unmounted, "COVID 1 of 1 (1 without suffix: links to nothing)", "fetch what links lead to"),
    ],
)
def test_a_class_never_vanishes(flat: Path, change: Callable[[Path], None], words: str, fix: str) -> None:
    change(flat)
    with pytest.raises(UserError) as caught:
        list_source(flat)
    message = str(caught.value)
    assert f"{flat}: images would be lost: {words}; " in message
    assert fix in message
    assert message.endswith("or remove the folder, or leave them out (build --on-error skip)")
    assert "\n" not in message
    listing = list_source(flat, "skip")
    assert {image.class_name for image in listing.images} == CLASSES.keys() - {"COVID"}
    assert Note(f"no class, as none of its pictures is taken: {words}", warning=True) in listing.notes


def test_all_classes_cannot_be_skipped(flat: Path) -> None:
    rename(pngs(flat), ".heic")
    for on_error in ("stop", "skip"):
        with pytest.raises(UserError, match=r"COVID 12 of 12 .* and 1 more; convert .*, or remove the folder$"):
            list_source(flat, on_error)


def half_to_heic(source: Path) -> None:
    rename(pngs(source / "COVID")[::3], ".heic")


def one_link_to_nothing(source: Path) -> None:
    (source / "COVID/gone.png").symlink_to("/nowhere/gone.png")


def one_pipe(source: Path) -> None:
    os.mkfifo(source / "COVID/pipe.png")


@pytest.mark.parametrize(
    ("change", "words", "key", "images"),
    [
        (half_to_heic, "COVID 4 of 12 (4 .heic: ", ("COVID", Reason.FORMAT, ".heic", 4), 44),
        (one_link_to_nothing, "COVID 1 of 13 (1 .png: ", ("COVID", Reason.BROKEN, ".png", 1), 48),
        (one_pipe, "COVID 1 of 13 (1 .png: ", ("COVID", Reason.SPECIAL, ".png", 1), 48),
    ],
)
def test_a_class_that_loses_some_is_an_error_unless_they_are_skipped(
    flat: Path, tmp_path: Path, change: Callable[[Path], None], words: str, key: tuple[object, ...], images: int
) -> None:
    change(flat)
    with pytest.raises(UserError, match=r"or leave them out .build --on-error skip.$") as caught:
        build_dataset(flat, tmp_path / "d", BuildOptions(image_size=16, workers=1))
    assert words in str(caught.value)
    assert not (tmp_path / "d").exists()
    for reused in (False, True):
        summary = build_dataset(flat, tmp_path / "d", BuildOptions(image_size=16, workers=1, on_error="skip"))
        assert summary.reused == reused
        [item] = summary.manifest.not_taken
        assert (item.folder, item.reason, item.suffix, item.files) == key
        assert len(summary.manifest.rows) == images
    with pytest.raises(UserError, match="leave them out"):
        build_dataset(flat, tmp_path / "d", BuildOptions(image_size=16, workers=1))


def test_one_picture_of_a_hundred_may_be_lost_and_is_said(tmp_path: Path) -> None:
    root = tmp_path / "source"
    for name in ("A", "B"):
        (root / name).mkdir(parents=True)
        for number in range(99):
            (root / name / f"{number}.png").write_bytes(b"")
    (root / "A/x.heic").write_bytes(b"")
    assert counts(list_source(root)) == {("A", Reason.FORMAT, ".heic"): 1}
    assert not_taken_lines(list_source(root).not_taken) == [
        "not taken: A: 1 .heic: images in another format (A/x.heic)"
    ]
    (root / "A/98.png").unlink()
    with pytest.raises(UserError, match=r"A 1 of 99"):
        list_source(root)


def test_capitals_and_loose_images(flat: Path) -> None:
    (flat / "COVID/Images").mkdir()
    for file in pngs(flat / "COVID"):
        file.rename(flat / "COVID/Images" / file.name)
    for number in range(5):
        (flat / f"loose-{number}.png").write_bytes(b"")
    (flat / "x.heic").write_bytes(b"")
    listing = list_source(flat)
    assert len(listing.images) == 48
    assert counts(listing) == {("", Reason.LOOSE, ".png"): 5, ("", Reason.LOOSE, ".heic"): 1}
    assert not_taken_lines(listing.not_taken) == [
        "not taken: 5 .png, 1 .heic: images outside of the class folders (loose-0.png)"
    ]


def test_empty_folders_are_named(flat: Path) -> None:
    (flat / "COVID/patient7").mkdir()
    [note] = list_source(flat).notes
    assert note.text == "empty folders: COVID/patient7"
    (flat / "New folder").mkdir()
    (flat / "New folder/.DS_Store").write_bytes(b"")
    with pytest.raises(UserError, match="New folder: this class folder contains no image"):
        list_source(flat)


def test_git_lfs_pointers_are_called_so(flat: Path, tmp_path: Path) -> None:
    for file in pngs(flat / "COVID"):
        file.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n")
    with pytest.raises(ImageError, match=r"COVID-0\.png: is a Git LFS pointer .*git lfs pull"):
        build_dataset(flat, tmp_path / "d", BuildOptions(image_size=16, workers=1))


# Links


def paths_of(source: Path) -> list[str]:
    return [image.path for image in find_images(source)]


@pytest.mark.parametrize(
    ("link", "target", "shown"),
    [
        ("COVID/loop", ".", "COVID/loop -> COVID"),
        ("COVID/images", ".", "COVID/images -> COVID"),
        ("COVID/images", "../COVID", "COVID/images -> COVID"),
        ("Loop", ".", "Loop -> ."),
        ("Above", "../..", "Above -> ."),
        ("COVID/up", "..", "COVID/up -> ."),
    ],
)
def test_a_link_back_is_not_followed_and_is_named(flat: Path, link: str, target: str, shown: str) -> None:
    before = paths_of(flat)
    (flat / link).symlink_to(target)
    listing = list_source(flat)
    assert [image.path for image in listing.images] == before
    assert [(item.reason, item.files) for item in listing.not_taken] == [(Reason.FOLDER_LINK, 1)]
    assert any(shown in note.text for note in listing.notes)


@pytest.mark.parametrize(
    ("link", "target"),
    [("Normal copy", "Normal"), ("A", "Normal"), ("Z", "Normal/inner"), ("COVID/images", "../Normal")],
)
def test_a_link_that_makes_two_classes_of_one_is_an_error(flat: Path, link: str, target: str) -> None:
    (flat / "Normal/inner").mkdir()
    (flat / link).symlink_to(target)
    name = target.removeprefix("../")
    with pytest.raises(UserError, match=f"'{link}' is a link to '{name}', so its images would be in two classes"):
        list_source(flat)


def test_two_links_to_one_folder_outside(flat: Path, tmp_path: Path) -> None:
    (flat / "COVID").rename(tmp_path / "elsewhere")
    (flat / "COVID").symlink_to(tmp_path / "elsewhere")
    assert len(paths_of(flat)) == 48, "a class may be a link"
    (flat / "Corona").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"'Corona' is a link to 'COVID'|'COVID' is a link to 'Corona'"):
        list_source(flat)


def test_links_to_images(flat: Path, tmp_path: Path) -> None:
    before = paths_of(flat)
    (flat / "COVID/again.png").symlink_to("COVID-1.png")
    listing = list_source(flat)
    assert [image.path for image in listing.images] == before
    assert counts(listing) == {("COVID", Reason.FILE_LINK, ".png"): 1}
    [line] = not_taken_lines(listing.not_taken)
    assert "COVID/again.png -> COVID/COVID-1.png" in line
    # One that leads elsewhere is an image; two that lead there are one.
    (flat / "COVID/again.png").unlink()
    shutil.copy(flat / "COVID/COVID-1.png", tmp_path / "stored.png")
    for name in ("x", "y"):
        (flat / f"COVID/{name}.png").symlink_to(tmp_path / "stored.png")
    listing = list_source(flat)
    assert {image.path for image in listing.images} == {*before, "COVID/x.png"}
    assert counts(listing) == {("COVID", Reason.FILE_LINK, ".png"): 1}
    # In another class it is a contradiction for the search for near-duplicates to find.
    (flat / "Normal/z.png").symlink_to("../COVID/COVID-2.png")
    assert "Normal/z.png" in paths_of(flat)


# What people read


def test_the_output_of_a_build(flat: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def lines(*options: str) -> list[str]:
        arguments = [str(flat), str(tmp_path / "d"), "--image-size", "16", "--workers", "1", *options]
        main.main(["build", *arguments])
        return capsys.readouterr().out.splitlines()

    clean = lines()
    assert clean[0].split() == ["class", "train", "validation", "test"], "nothing is said of a clean collection"
    assert len(clean) == 9
    assert [line.partition(" has few")[0] for line in clean if "warning" in line] == ["warning: the validation split"]
    (flat / "README.txt").write_text("read me")
    (flat / "loose.png").write_bytes(PNG)
    half_to_heic(flat)
    for again in range(2):
        printed = lines("--on-error", "skip")
        assert [line for line in printed if line.startswith(("not taken", "other files"))] == [
            "not taken: 1 .png: images outside of the class folders (loose.png)",
            "not taken: COVID: 4 .heic: images in another format (COVID/COVID-0.heic)",
            "other files: 1 (documents: 1)",
        ]
        assert ("is already complete" in printed[-1]) == bool(again)
    with pytest.raises(SystemExit) as caught:
        lines()
    assert caught.value.code == 2


def test_names_that_cannot_be_printed(flat: Path, tmp_path: Path) -> None:
    (flat / "docs\n\udcff").mkdir()
    (flat / "docs\n\udcff/x\udcff.png.\udcfe").write_bytes(b"")
    (flat / "docs\n\udcff/y.unknown").write_bytes(b"")
    manifest = build_dataset(flat, tmp_path / "d", BuildOptions(image_size=16, workers=1)).manifest
    assert read_manifest(tmp_path / "d").not_taken == manifest.not_taken
    for line in not_taken_lines(manifest.not_taken):
        assert line.isprintable()
        line.encode()


@given(st.text(st.characters(codec=None, exclude_characters="/\0")))
def test_any_name_is_printable_and_has_a_short_suffix(name: str) -> None:
    printable(name).encode()
    assert printable(name).isprintable()
    assert len(suffix_of(name)) <= 9
    assert suffix_of(name) == "" or name.lower().endswith((suffix_of(name), ".nii.gz"))
