//! A checkpoint as the place that candle takes its weights from: each is decoded when it is asked for.

use std::path::Path;

use candle_core::{DType, Device, Error, Result, Shape, Tensor};
use candle_nn::Init;
use candle_nn::var_builder::SimpleBackend;
use llmpress_formats::{Checkpoint, Dtype};

pub struct Weights(Checkpoint);

impl Weights {
    /// Opens a checkpoint; what another tool quantised is seen as numbers.
    pub fn open(path: &Path) -> llmpress_formats::Result<Self> {
        Checkpoint::open_dequantised(path).map(Self)
    }

    /// Its config.json.
    pub fn config(&self) -> std::result::Result<&str, String> {
        let config =
            self.0.config().ok_or_else(|| format!("{}: has no config.json", self.0.root().display()))?;
        Ok(config.text())
    }
}

impl SimpleBackend for Weights {
    fn get(&self, shape: Shape, name: &str, _: Init, dtype: DType, device: &Device) -> Result<Tensor> {
        let tensor = self.get_unchecked(name, dtype, device)?;
        if *tensor.shape() != shape {
            let msg = format!("the model wants another shape of {name}");
            return Err(Error::UnexpectedShape { msg, expected: shape, got: tensor.shape().clone() });
        }
        Ok(tensor)
    }

    fn get_unchecked(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        let tensor = self.0.tensor(name).map_err(Error::wrap)?;
        let stored = match tensor.dtype {
            Dtype::BF16 => DType::BF16,
            Dtype::F16 => DType::F16,
            Dtype::F32 => DType::F32,
            other => {
                return Err(Error::Msg(format!(
                    "{name} is {}, and this takes BF16, F16 and F32",
                    other.name()
                )));
            }
        };
        let shape: Vec<usize> = tensor.shape.iter().map(|&size| size as usize).collect();
        let bytes = self.0.read_tensor(name).map_err(Error::wrap)?;
        Tensor::from_raw_buffer(&bytes, stored, &shape, device)?.to_dtype(dtype)
    }

    fn contains_tensor(&self, name: &str) -> bool {
        self.0.tensor(name).is_ok()
    }
}
