//! Any bytes as the components of a matrix of two in four, alone and with sums beside: decoded, or refused; whatever is not
//! refused keeps two of each quad and packs again to the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use llmpress_formats::Dtype;
use llmpress_formats::encoding::abq::Floats;
use llmpress_formats::encoding::lowrank::{self, BaseRows, Sums};
use llmpress_formats::encoding::sparse24::{Kept, Packed, positions};

/// Rows, columns, dtype, columns of a sum, whether positions are made sound, then bytes for all components.
type Input<'a> = (u8, u8, u8, u8, bool, &'a [u8]);

fuzz_target!(|input: Input<'_>| {
    let (rows, cols, dtype, block, sound_places, data) = input;
    let (rows, cols) = (usize::from(rows % 8), usize::from(cols));
    let dtype = [Dtype::F16, Dtype::BF16, Dtype::F32][usize::from(dtype % 3)];
    let width = dtype.bits() as usize / 8;
    let mut bytes = data.iter().copied().cycle();
    let mut take = |n: usize| -> Vec<u8> { (0..n).map(|_| bytes.next().unwrap_or(0)).collect() };
    let of_row = positions::row_bytes(cols);
    let mut places = take(rows * of_row);
    if sound_places && of_row > 0 {
        for row in places.chunks_exact_mut(of_row) {
            let nibbles: Vec<u8> = (0..cols / 4)
                .filter_map(|quad| positions::fill_up(1 << (positions::get(row, quad) % 4)))
                .collect();
            positions::pack_row(nibbles, row);
        }
    }
    let values = Floats::new(dtype, take(rows * (cols / 2) * width)).expect("whole elements");
    let Ok(packed) = Packed::new(rows, cols, places, Kept::Plain(values)) else {
        assert!(!cols.is_multiple_of(4));
        return;
    };
    let sound = packed.check().is_ok();
    assert!(sound || !sound_places);
    let mut row = vec![0.0; cols];
    let decoded = (0..rows).fold(true, |all, i| all & packed.decode_row(i, &mut row).is_ok());
    assert_eq!(sound, decoded);
    if sound {
        for (row, quad) in (0..rows).flat_map(|row| (0..cols / 4).map(move |quad| (row, quad))) {
            let mask = positions::to_mask(positions::get(packed.positions_of(row), quad));
            assert_eq!(mask.count_ones(), 2);
        }
        let Kept::Plain(values) = packed.values() else { return };
        let mut dense = vec![0; rows * cols * width];
        for (i, value) in values.bytes().chunks_exact(width).enumerate() {
            let (quad, second) = (i / 2, i % 2);
            let (row, of) = (quad / (cols / 4), quad % (cols / 4));
            let at = positions::places(positions::get(packed.positions_of(row), of)).expect("sound");
            let place = (quad * 4 + if second == 1 { at.1 } else { at.0 }) * width;
            dense[place..place + width].copy_from_slice(value);
        }
        let places = packed.positions().to_vec();
        let again = Packed::pack(dtype, rows, cols, &dense, places).expect("it was sound");
        assert!(again == packed);
        Packed::from_dense(dtype, rows, cols, &dense).expect("it is two in four");
    }
    let block = u32::from(block);
    let blocks = cols.div_ceil(usize::from(block.max(1) as u16));
    let sums = Floats::new(dtype, take(rows * blocks * width)).expect("whole elements");
    let Ok(both) = lowrank::Packed::new(block, rows, cols, BaseRows::Sparse24(packed), Sums::Plain(sums))
    else {
        assert!(block == 0);
        return;
    };
    let sound = both.check().is_ok();
    let decoded = (0..rows).fold(true, |all, i| all & both.decode_row(i, &mut row).is_ok());
    assert_eq!(sound, decoded);
});
