"""What a run trains on, written out with the sources."""

from flipkd_dist.config import RunConfig
from flipkd_dist.losses import FORMULAS

SUP_ALONE = "mean of -log p(y), p = (1 + cos θᵢᵢ)/2"  # of texts that are read alone


def formula_of(config: RunConfig) -> tuple[str, str]:
    """The weighted losses, each written out, and their sources; a loss of weight 0 is left out."""
    loss = config.loss
    weights = {"sup": loss.sup_weight, "dist": loss.dist_weight, loss.contrastive: loss.mcl_weight}
    weights = {name: weight for name, weight in weights.items() if weight}
    total = " + ".join(f"L_{name}" if weight == 1 else f"{weight:g} L_{name}" for name, weight in weights.items())
    equations = {name: FORMULAS[name][0] for name in weights}
    if "sup" in weights and config.student.mode == "alone":
        equations["sup"] = SUP_ALONE
    written = [f"L_{name} = {equation}" for name, equation in equations.items()]
    if "mcl" in weights and loss.mcl_negative_margin == "anchor":
        written.append("τᵢᵢ in place of τᵢⱼ")
    if loss.contrastive in weights and loss.mcl_symmetric:
        written.append(f"L_{loss.contrastive} is the mean of both directions")
    if loss.threshold is None and weights.keys() - {"sup"}:
        written.append("all φ = 1")
    return "; ".join([total, *written]), "; ".join(dict.fromkeys(FORMULAS[name][1] for name in weights))
