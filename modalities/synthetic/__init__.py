"""A consortium of raw files whose truth is known: slides, scans, counts and registry rows.

The files are what hospitals have (pyramidal TIFF, DICOM and NIfTI, AnnData, CSV); what each
modality shows follows latent factors with a known effect on survival, under stains, scanners and
batches of each site's own. So a whole study can be run, and its models compared with the true
hazard, without a patient behind it.
"""

from modalities.synthetic.consortium import SITE_FILES, simulate
from modalities.synthetic.counts import GENE_SETS
from modalities.synthetic.truth import Truth, read_truth

__all__ = ["GENE_SETS", "SITE_FILES", "Truth", "read_truth", "simulate"]
