"""Load dictionaries by folder, by name in sae-lens' registry, or from the hub, and read what they say of their training."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from glob import escape
from pathlib import Path, PurePosixPath
from typing import Any, cast, get_type_hints

import torch
from huggingface_hub import list_repo_files, snapshot_download
from sae_lens import SAE, TemporalSAE
from sae_lens.constants import ACTIVATION_SCALER_CFG_FILENAME, SAE_CFG_FILENAME
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from sae_lens.training.activation_scaler import ActivationScaler
from transformer_lens.supported_models import MODEL_ALIASES

from featpatch.errors import FeatpatchError, is_number, listed
from featpatch.files import as_path, read_json
from featpatch.model.facts import dtype_named
from featpatch.model.sources import check_device, check_there, folder_with, near_folder, not_found, numerically
from featpatch.sae import cross_formats
from featpatch.sae.adapted import Adapted, placed
from featpatch.sae.cross import Cross
from featpatch.sae.formats import READERS, read
from featpatch.sae.sae_lens import SCALED, Training, check_sizes
from featpatch.sae.weights import Weights
from featpatch.untrusted import short


def official_name(model: str) -> str:
    """Return a model's name in lower case, without its owner and with aliases resolved; empty for a folder."""
    if Path(model).exists():
        return ""
    official = next((name for name, aliases in MODEL_ALIASES.items() if model in aliases), model)
    return official.rsplit("/", 1)[-1].lower()


SUMMED = "mntss_clt_layer_transcoder"
"""The loader with which sae-lens reads cross-layer transcoders; it sums the decoders of all layers."""


def load_sae(
    source: str | Path,
    *,
    device: str = "cpu",
    dtype: str | torch.dtype | None = None,
    norm_scaling_factor: float | None = None,
    hook: str | Sequence[str] | None = None,
    hook_out: str | Sequence[str] | None = None,
) -> SAE[Any] | Adapted | Cross:
    """Load an SAE, transcoder or crosscoder, of sae-lens or of one of the libraries below.

    Args:
        source: a folder, `release/id` of sae-lens' registry, such as `gpt2-small-res-jb/blocks.8.hook_resid_pre`, or
            `owner/repository/folder` on the hub. A folder is recognised by its files: `sae_weights.safetensors` (sae-lens),
            `ae.pt` (dictionary_learning), `sae.safetensors` (sparsify), `params.npz` or `params.safetensors` (Gemma Scope),
            `W_enc_N.safetensors` (circuit-tracer), `config.json` with a `sae_type` (OpenMOSS).
            From a circuit-tracer set of transcoders, name one layer: `folder/layer_3`. A cross-layer transcoder (CLT) is loaded
            as a whole, from its folder, from `owner/repository`, or from a release in which sae-lens sums its decoders; its
            decoders stay in their files, so leave these where they are.
        device: the device to load it on.
        dtype: the dtype to load it in; by default that of the weights, or float32 for downloads through sae-lens.
        norm_scaling_factor: the scale of an `expected_average_only_in` SAE, if neither its folder (activation_scaler.json, or
            norm_scaling_factor in cfg.json's metadata) nor the registry has it.
        hook, hook_out: the hook points that it reads and writes, if its files name none or other ones; lists, from the lowest
            layer up, for a CLT or a crosscoder.

    Returns:
        A sae-lens object if sae-lens has a class that computes the same; a `CrossLayerTranscoder` or a `Crosscoder` of
        `fp.dictionaries`; otherwise an `Adapted`, as from `adapt`.

    Raises:
        FeatpatchError: there is no such SAE, it can't be loaded, its hook point is not known, or it is a single layer of a
            cross-layer transcoder.

    Examples:
        >>> sae = fp.load_sae(demo.folder / "saes" / "blocks.1.hook_resid_pre")
        >>> sae.cfg.metadata.hook_name
        'blocks.1.hook_resid_pre'
    """
    check_device(device)
    kind = dtype_named(dtype)
    named = None if kind is None else str(kind).removeprefix("torch.")
    if norm_scaling_factor is not None:
        _check_scale(norm_scaling_factor)
    if not isinstance(source, (str, Path)):
        raise FeatpatchError(f"the SAE is named by a {type(source).__name__}: expected a folder or a name")
    for name, value in (("hook", hook), ("hook_out", hook_out)):
        names = value if isinstance(value, (list, tuple)) else [value]
        if not names or not all(isinstance(each, str | None) and each != "" for each in names):
            raise FeatpatchError(
                f"{name}={value!r}: expected the name of a hook, such as 'blocks.3.hook_resid_post', or a list of names for a "
                "dictionary over several layers"
            )
    hooks = hook, hook_out
    found: SAE[Any] | Weights | Cross | None = cross_formats.read(as_path(source), hooks) or read(as_path(source))
    if found is None and Path(source).exists():
        if not (Path(source) / SAE_CFG_FILENAME).is_file() and (names := _inside(Path(source))):
            raise FeatpatchError(_several(str(source), names))
        found = _from_folder(folder_with(source, SAE_CFG_FILENAME, "SAE"), device, named, norm_scaling_factor)
    elif found is None:
        check_there("SAE", source)
        found = _from_hub(str(source), device, named, norm_scaling_factor, hooks)
    if isinstance(found, Cross):
        _check_unscaled(repr(found), norm_scaling_factor)
        return found.to(kind, device)
    if not isinstance(hook, str | None) or not isinstance(hook_out, str | None):
        raise FeatpatchError(
            f"hook={hook!r}, hook_out={hook_out!r}: expected one name each, because {str(source)!r} is no dictionary "
            "over several layers"
        )
    if isinstance(found, Weights):
        _check_unscaled(found.origin, norm_scaling_factor)
        return placed(found.to(kind, device).at(hook, hook_out))
    metadata = found.cfg.metadata
    metadata.hook_name = metadata.hook_name if hook is None else hook
    if hook_out is not None:
        metadata.hook_name_out = hook_out
    return found


def _check_unscaled(what: str, norm_scaling_factor: float | None) -> None:
    if norm_scaling_factor is not None:
        raise FeatpatchError(
            f"norm_scaling_factor={norm_scaling_factor}: expected None, because {what} is not scaled, or its scale is "
            "folded in already; leave it out"
        )


def _across(repository: str, folder: str, hooks: cross_formats.Hooks) -> Cross | None:
    """Download a dictionary over several layers and read it; None if the repository's folder does not hold one.

    Raises:
        FeatpatchError: a file is damaged, or the hook points are not known.
        Exception: the repository or a file can't be downloaded.
    """
    start = escape(f"{folder}/" if folder else "")
    root = Path(snapshot_download(repository, allow_patterns=[start + file for file in cross_formats.SETTINGS]))
    if wanted := cross_formats.files_of(root / folder):
        root = Path(snapshot_download(repository, allow_patterns=[start + file for file in (*cross_formats.SETTINGS, *wanted)]))
        return cross_formats.read(root / folder, hooks)
    return None


def _from_hub(
    source: str, device: str, dtype: str | None, norm_scaling_factor: float | None, hooks: cross_formats.Hooks
) -> SAE[Any] | Weights | Cross:
    """Load an SAE from the registry or a repository in sae-lens' format, or what a repository holds in another format."""
    if source.count("/") == 1 and source.partition("/")[0] not in get_pretrained_saes_directory():
        try:
            whole = _across(source, "", hooks)
        except FeatpatchError:
            raise
        except Exception:
            whole = None  # no such repository, or no network: the error below says what to do
        if whole is not None:
            return whole
    location = Location.of(source)
    if location.loader == SUMMED:
        return _summed(source, get_pretrained_saes_directory()[location.release].repo_id, hooks)
    try:
        sae = SAE.from_pretrained(location.release, location.sae_id, device=device, dtype=dtype or "float32")
    except Exception as error:
        other = _of_other_library(location, hooks) if "/" in location.release else None
        if other is None:
            raise not_found("SAE", source, error) from error
        return other
    if sae.cfg.normalize_activations != SCALED:
        _check_unscaled(repr(source), norm_scaling_factor)
    elif norm_scaling_factor is not None:
        sae.fold_activation_norm_scaling_factor(norm_scaling_factor)
    metadata = sae.cfg.metadata
    metadata.explained_variance = metadata.explained_variance or location.explained_variance
    metadata.model_from_pretrained_kwargs = metadata.model_from_pretrained_kwargs or location.model_options
    return sae


def _summed(source: str, repository: str, hooks: cross_formats.Hooks) -> Cross:
    """Load the whole of a cross-layer transcoder of which sae-lens loads single layers."""
    try:
        whole = _across(repository, "", hooks)
    except FeatpatchError:
        raise
    except Exception as error:
        raise not_found("SAE", source, error) from error
    if whole is None:
        raise FeatpatchError(
            f"{source} is one layer of a cross-layer transcoder, and {repository} does not hold the whole of it: expected "
            "config.yaml and W_enc_N.safetensors and W_dec_N.safetensors for all layers; load a folder with these files"
        )
    return whole


def wanted_processing(saes: Sequence[Any]) -> tuple[str, ...]:
    """Return the weight processing of the model that the SAEs were trained on, according to their configurations.

    Raises:
        FeatpatchError: they were trained on differently processed weights.
    """
    said = [(sae.cfg.metadata.hook_name, Training.of(sae).processing) for sae in saes if isinstance(sae, SAE)]
    ways = {processing for _, processing in said}
    if len(ways) > 1:
        raise FeatpatchError(
            f"the SAEs were trained on weights that were processed in different ways {said}: expected the same processing; "
            "load a model for each, or choose with processing=[...]"
        )
    return next(iter(ways), ())


@dataclass(frozen=True)
class Location:
    """The location of an SAE: a release of the registry or a repository on the hub, and the id or folder in it.

    Attributes:
        release: the release, or `owner/repository`.
        sae_id: the id of the SAE in the release, or the folder in the repository.
        loader: sae-lens' name of the loader; None for its own format.
        explained_variance: the explained variance according to the registry; None if unknown.
        model_options: the options with which the model was loaded for training, according to the registry. sae-lens drops them
            if the repository's configuration is in its newer format.
    """

    release: str
    sae_id: str
    loader: str | None = None
    explained_variance: float | None = None
    model_options: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, name: str) -> "Location":
        """Parse `release/id` or `owner/repository/folder`.

        Raises:
            FeatpatchError: the name is neither, or the release has no such SAE.
        """
        registry = get_pretrained_saes_directory()
        first, _, rest = name.partition("/")
        if first in registry:
            known = registry[first]
            if rest not in known.saes_map:
                near = [known_id for known_id in known.saes_map if rest and rest in known_id] or list(known.saes_map)
                raise FeatpatchError(
                    f"release {first!r} has no SAE {rest!r}: expected one of its {len(known.saes_map)}, such as "
                    f"{', '.join(f'{first}/{known_id}' for known_id in near[:3])}"
                )
            said = known.expected_var_explained[rest]
            options = (known.config_overrides or {}).get("model_from_pretrained_kwargs")
            return cls(first, rest, known.conversion_func, said if 0 < said < 1 else None, cast(Any, options))
        repository, _, folder = rest.partition("/")
        if repository and not folder and (names := _held(name, "")):
            raise FeatpatchError(_several(name, names))
        if not repository or not folder:
            near = [release for release in registry if first in release or release in first][:3]
            raise FeatpatchError(
                f"there is no SAE {name!r}: expected a folder with {SAE_CFG_FILENAME}{near_folder(name)}, release/id from the "
                f"sae-lens registry{f' (releases such as {chr(44).join(near)})' if near else ''}, or owner/repository/folder "
                "on the hub"
            )
        return cls(f"{first}/{repository}", folder)


def _of_other_library(location: Location, hooks: cross_formats.Hooks) -> Weights | Cross | None:
    """Read what a folder of a repository holds in another library's format; None if that is nothing in a known format.

    Raises:
        FeatpatchError: the weights are damaged, their kind is not supported, or the folder holds several dictionaries.
    """
    try:
        wanted = [escape(file) for file in _files_of(location.sae_id)]
        root = Path(snapshot_download(location.release, allow_patterns=wanted))
    except Exception:
        return None  # sae-lens failed for the same reason, and its error names it
    if cross_formats.files_of(root / location.sae_id):
        return _across(location.release, location.sae_id, hooks)
    weights = read(root / location.sae_id)
    if weights is None and (names := _held(location.release, location.sae_id) or _inside(root / location.sae_id)):
        raise FeatpatchError(_several(f"{location.release}/{location.sae_id}", names))
    return weights


def _held(repository: str, folder: str) -> list[str]:
    """List the dictionaries in a folder of a repository; none if the hub can't be reached."""
    try:
        files = list_repo_files(repository)
    except Exception:
        return []  # no network, or no such repository: the caller's error says what to do
    start = f"{folder}/" if folder else ""
    return _among(file.removeprefix(start) for file in files if file.startswith(start))


def _inside(folder: Path) -> list[str]:
    """List the dictionaries in the subfolders of a folder, as `_among` names them."""
    return _among(each.relative_to(folder).as_posix() for pattern in ("*", "*/*") for each in folder.glob(pattern))


def _several(name: str, inside: Sequence[str]) -> str:
    """Return the error message for a folder or repository that holds several dictionaries."""
    example = f"{name}/{inside[0]}"
    return f"{name!r} holds several dictionaries ({listed(inside, 40)}): expected one; name it, such as {example!r}"


def _among(names: Iterable[str]) -> list[str]:
    """List the dictionaries among these files that `read` or sae-lens can load, sorted by the numbers in their names."""
    folders = set()
    for name in map(PurePosixPath, names):
        if name.name in (*READERS, *cross_formats.MARKS, "sae_weights.safetensors") and name.parent.name:
            folders.add(str(name.parent))
        elif re.fullmatch(r"layer_\d+\.safetensors", name.name):
            folders.add(str(name.with_suffix("")))
    return numerically(folders)


def _files_of(folder: str) -> list[str]:
    """List the files of a repository that `read` needs for one of its folders."""
    up = str(PurePosixPath(folder).parent)
    above = "" if up == "." else f"{up}/"
    own = [f"{folder}/{file}" for file in (*READERS, "config.json", "cfg.json", "config.yaml")]
    return [*own, folder, f"{folder}.safetensors", f"{above}config.yaml", f"{above}config.json"]


def _from_folder(folder: Path, device: str, dtype: str | None, norm_scaling_factor: float | None) -> SAE[Any]:
    """Load an SAE from disk and fold in the statistics of its training, as `from_pretrained` does."""
    try:
        settings = read_json((folder / SAE_CFG_FILENAME).read_text(encoding="utf-8"))
        check_sizes(settings if isinstance(settings, dict) else {})
        sae: SAE[Any] = SAE.load_from_disk(folder, device=device, dtype=dtype)
        _check_types(sae.cfg)
        scaled = sae.cfg.normalize_activations == SCALED  # no longer, once the scale is folded in
        said = sae.cfg.metadata.norm_scaling_factor if norm_scaling_factor is None else norm_scaling_factor
        scaler = ActivationScaler(scaling_factor=said)
        if (folder / ACTIVATION_SCALER_CFG_FILENAME).is_file() and norm_scaling_factor is None:
            scaler.load(folder / ACTIVATION_SCALER_CFG_FILENAME)
        if scaled and scaler.scaling_factor is not None:
            _check_scale(scaler.scaling_factor)
            sae.cfg.metadata.norm_scaling_factor = scaler.scaling_factor
            if not isinstance(sae, TemporalSAE):
                sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
        if sae.cfg.normalize_activations == "covariance_whitening" and scaler.whitening is not None:
            whitening = scaler.whitening
            sae.fold_activation_whitening(whitening.mean, whitening.matrix, whitening.inverse_matrix)
    except Exception as error:
        raise FeatpatchError(
            f"the SAE in {str(folder)!r} can't be loaded ({type(error).__name__}: {short(error)}): expected a complete "
            "sae-lens folder; download or save it again"
        ) from error
    if not scaled:
        _check_unscaled(repr(str(folder)), norm_scaling_factor)
    return sae


def _check_types(cfg: Any) -> None:
    """Raise a FeatpatchError unless settings have the types that their class declares, which sae-lens does not check."""
    kinds: dict[Any, tuple[type, ...]] = {bool: (bool,), str: (str,), int: (int, float), float: (int, float)}
    for name, kind in get_type_hints(type(cfg)).items():
        value = getattr(cfg, name)
        if kind in kinds and type(value) not in kinds[kind]:
            raise FeatpatchError(f"{name} is {value!r}: expected {kind.__name__}")


def _check_scale(scale: object) -> None:
    if not is_number(scale) or not 0 < scale < float("inf"):
        raise FeatpatchError(f"norm_scaling_factor is {scale!r}: expected a positive number")
