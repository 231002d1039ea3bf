//! Experts of an architecture: how they are stored, how they are picked.

use super::Bias;

/// Experts and the router that picks among them.
#[derive(Debug)]
pub struct Experts {
    /// The module that holds them.
    pub module: &'static str,
    /// Gate, up and down of each.
    pub names: [&'static str; 3],
    /// How they lie in one tensor each, where they may; those that are stored apart are read too.
    pub stacked: Option<Stacked>,
    /// The router, in the module.
    pub router: &'static str,
    /// Whether the router has a bias.
    pub router_bias: bool,
    /// What is added to scores where experts are compared, and to no weight: its tensor, in the module.
    pub correction: Option<&'static str>,
    /// What says how many there are: the first one that is there counts.
    pub count: &'static [&'static str],
    /// What says their inner size.
    pub intermediate: &'static str,
    /// What is compared.
    pub scores: Scores,
    /// How groups of them are picked first, where they are.
    pub groups: Option<GroupRule>,
    /// Whether the weights of picked ones are scaled to a sum of one.
    pub normalise: Bias,
    /// The key of what weights are multiplied by, and what holds where it is absent.
    pub scale: Option<(&'static str, f64)>,
    /// Whether a weight multiplies what its expert reads, instead of what it gives out.
    pub weighs_inputs: bool,
    /// The function of their gates, where it is the clamped one.
    pub clamp: Option<Clamp>,
    /// One that every token goes through.
    pub shared: Option<SharedExpert>,
    /// Which layers have them; the others have a dense MLP.
    pub layers: ExpertLayers,
}

/// What logits become before experts are compared, and what the weights of picked ones are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scores {
    /// Softmax over all experts (Fedus et al., Switch Transformers, equation 1).
    Softmax,
    /// Softmax over the logits of those that are picked (Shazeer et al., Outrageously Large Neural Networks, equation 3).
    SoftmaxOfPicked,
    /// Sigmoid of each (DeepSeek-V3, equation 15).
    Sigmoid,
}

/// `n_group` groups of experts, of which `topk_group` are looked at alone (DeepSeek-V2, section 2.1.2).
#[derive(Debug)]
pub struct GroupRule {
    /// A group is as good as the sum of so many of its best experts.
    pub best: usize,
    /// A key, and what it must say for there to be groups.
    pub only: Option<(&'static str, &'static str)>,
}

/// Experts in one tensor: gate and up of all, and down of all, the expert's number first.
#[derive(Debug)]
pub struct Stacked {
    /// Gate and up, and down, in the module's `experts`.
    pub names: [&'static str; 2],
    /// Whether the matrix of an expert is stored as `[inputs, outputs]`.
    pub transposed: bool,
    /// Whether the rows of gate and up take turns, instead of all of gate and then all of up.
    pub interleaved: bool,
    /// Whether there are biases, under the same names with `_bias`.
    pub bias: bool,
}

/// `(clamp(up) + 1) clamp(gate) sigmoid(alpha clamp(gate))`: the keys of alpha and of the limit, and what holds where they are absent.
#[derive(Debug)]
pub struct Clamp {
    /// Alpha.
    pub alpha: (&'static str, f64),
    /// The most that a gate is, and up in size.
    pub limit: (&'static str, f64),
}

/// An expert that every token goes through.
#[derive(Debug)]
pub struct SharedExpert {
    /// Its module, in that of all.
    pub module: &'static str,
    /// Its inner size.
    pub size: SharedSize,
    /// What its output is multiplied by after a sigmoid: a matrix of one row, in the module of all.
    pub gate: Option<&'static str>,
}

/// The inner size of a shared expert.
#[derive(Debug)]
pub enum SharedSize {
    /// That of the others.
    Same,
    /// What stands under this key.
    Key(&'static str),
    /// That of the others times what stands under this key, or this.
    Times(&'static str, usize),
}

/// Which layers have experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpertLayers {
    /// All.
    All,
    /// Every `decoder_sparse_step`-th, without those in `mlp_only_layers`.
    SparseStep,
    /// Those from the one on that `first_k_dense_replace` says, or this.
    From(usize),
    /// Those in `moe_layers`; every `interleave_moe_layer_step`-th where it is absent.
    Listed,
}
