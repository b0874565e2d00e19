"""Sparse and dense linear classifiers with a duality gap; loss, penalty and solver are separate."""

from captum_concepts.solvers.calibration import Calibration, fit_calibration, truth_table
from captum_concepts.solvers.certificate import Certificate, elastic_net_certificate
from captum_concepts.solvers.elastic_net import ElasticNetResult, fit_elastic_net, lambda_max
from captum_concepts.solvers.loss import LogisticLoss, MultinomialLoss
from captum_concepts.solvers.path import ElasticNetPath, elastic_net_path
from captum_concepts.solvers.penalty import ElasticNet
from captum_concepts.solvers.relaxed import relaxed_fit

__all__ = [
    "Calibration",
    "Certificate",
    "ElasticNet",
    "ElasticNetPath",
    "ElasticNetResult",
    "LogisticLoss",
    "MultinomialLoss",
    "elastic_net_certificate",
    "elastic_net_path",
    "fit_calibration",
    "fit_elastic_net",
    "lambda_max",
    "relaxed_fit",
    "truth_table",
]
