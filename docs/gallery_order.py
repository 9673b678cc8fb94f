"""The order of the examples in the gallery: what people do first comes first."""

from pathlib import Path

ORDER = (
    *("quickstart", "plot_inputs", "plot_layers_and_activation_maps", "plot_grid_search"),
    *("plot_fine_tuning", "plot_errors_and_saliency", "plot_neighbors", "plot_map_and_clusters"),
    *("plot_regression", "plot_multilabel", "plot_column_transformer", "plot_vision_transformer"),
    *("probe", "plot_whitening", "plot_features_in_parquet", "array_api"),
    "plot_import_into_another_project",
)


class GalleryOrder:
    """A sort key of sphinx-gallery."""

    def __init__(self, src_dir):
        pass

    def __call__(self, filename):
        return ORDER.index(Path(filename).stem)
