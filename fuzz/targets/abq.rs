//! Any bytes as the components of an abq matrix: decoded to its formula, or refused; whatever is not refused packs again
//! to the same planes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use llmpress_formats::Dtype;
use llmpress_formats::encoding::abq::{Abq, Floats, Packed, Zero};

/// Parameters, rows, columns, kind of zero, dtypes, then bytes for all components.
type Input<'a> = (u8, bool, Option<u32>, u8, u8, u8, u8, &'a [u8]);

fuzz_target!(|input: Input<'_>| {
    let (bits, balanced, group_size, rows, cols, zero, dtypes, data) = input;
    let abq = Abq { bits, balanced, group_size, activation_bits: None };
    if abq.check().is_err() {
        return;
    }
    let (rows, cols) = (usize::from(rows % 8), usize::from(cols));
    let mut bytes = data.iter().copied().cycle();
    let mut take = |n: usize| -> Vec<u8> { (0..n).map(|_| bytes.next().unwrap_or(0)).collect() };
    let groups = rows * abq.groups(cols);
    let words = abq.planes() as usize * rows * cols.div_ceil(32);
    let planes: Vec<u32> =
        (0..words).map(|_| take(4)).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    let mut floats = |dtype: u8| {
        let dtype = [Dtype::F16, Dtype::BF16, Dtype::F32][usize::from(dtype % 3)];
        let bytes = take(groups * dtype.bits() as usize / 8);
        Floats::new(dtype, bytes).expect("whole elements")
    };
    let scale = floats(dtypes);
    let zero = match zero % 3 {
        0 => Zero::Symmetric,
        1 => Zero::Integer(scale.bytes()[..groups].to_vec().into()),
        _ => Zero::Real(floats(dtypes / 3)),
    };
    let Ok(packed) = Packed::new(abq, rows, cols, planes, scale, zero) else {
        assert!(cols == 0);
        return;
    };
    let sound = packed.check().is_ok();
    let (mut codes, mut row) = (vec![0; rows * cols], vec![0.0; cols]);
    let mut decoded = true;
    for i in 0..rows {
        packed.codes(i, &mut codes[i * cols..(i + 1) * cols]);
        decoded &= packed.decode_row(i, &mut row).is_ok();
    }
    assert_eq!(sound, decoded);
    if sound && cols > 0 {
        let (scale, zero) = (packed.scale().clone().into_owned(), packed.zero().clone().into_owned());
        let again = Packed::from_codes(abq, cols, &codes, scale, zero).expect("it was sound");
        assert!(again == packed);
    }
});
