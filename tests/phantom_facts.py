"""What is known of phantoms beside the generator: where organs are, and which HU a written file shows there."""

# Name of the landmark in the middle of each labelled organ -> its FLARE22 label.
ORGAN_LANDMARKS = {
    "liver_right_lobe": 1,
    "right_kidney_lateral_cortex": 2,
    "spleen_centre": 3,
    "pancreas_head": 4,
    "aorta_at_T12": 5,
    "cava_at_L2": 6,
    "right_adrenal_body": 7,
    "left_adrenal_body": 8,
    "gallbladder_centre": 9,
    "esophagus_at_T8": 10,
    "stomach_body": 11,
    "duodenum_descending": 12,
    "left_kidney_lateral_cortex": 13,
}

# Median HU over each FLARE22 label of a written file, up to voxels of 6 mm: the tissue above, widened by partial volume
# at thin organs and by what gut contains (gas to oral contrast medium).
LABEL_HU_RANGE = {
    1: ((26, 70), (44, 94), (74, 130)),
    2: ((0, 42), (60, 205), (105, 200)),
    3: ((20, 58), (80, 152), (76, 142)),
    4: ((-40, 50), (20, 122), (20, 110)),
    5: ((22, 56), (170, 345), (92, 185)),
    6: ((22, 56), (38, 160), (96, 178)),
    7: ((-30, 46), (5, 90), (5, 85)),
    8: ((-30, 46), (5, 90), (5, 85)),
    9: ((-8, 36), (-8, 40), (-8, 40)),
    10: ((-30, 52), (-30, 72), (-30, 75)),
    11: ((-960, 280), (-960, 300), (-960, 300)),
    12: ((-400, 280), (-400, 300), (-400, 300)),
    13: ((0, 42), (60, 205), (105, 200)),
}
