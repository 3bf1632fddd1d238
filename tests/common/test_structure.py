from tests.common.structure import DECLINED, findings


def test_model_files_follow_every_structural_rule_of_transformers_but_the_declined_ones():
    # Equal, not a subset: a rule that is followed after all leaves the list.
    assert {finding["rule"] for finding in findings()} == set(DECLINED)
