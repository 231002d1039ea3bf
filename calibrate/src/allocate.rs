//! The choices of least loss under a budget: a knapsack with one choice of each item.
//!
//! ```text
//! choices of an item, on the lower hull:  loss |\_      steps from the cheapest on, the most loss a bit first
//!                                         cost  ---->   until nothing more fits
//! ```
//!
//! On hulls the slopes of an item's steps only fall, so steps in the order of all slopes solve the linear relaxation, but for the
//! first step that does not fit (Sinha and Zoltners, 1979): the sum of losses is over the least one by that step's gain at most.

/// What an item may be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// What it takes of the budget.
    pub cost: u64,
    /// What it is expected to lose.
    pub loss: f64,
}

/// A choice of each item, by its index; none where not even the cheapest fit. All items that have as many choices may take the
/// same index: the result is never worse than that.
pub fn allocate(items: &[Vec<Choice>], budget: u64) -> Option<Vec<usize>> {
    let hulls: Vec<Vec<usize>> = items.iter().map(|choices| hull(choices)).collect();
    let cost = |chosen: &[usize]| -> u64 { items.iter().zip(chosen).map(|(item, &c)| item[c].cost).sum() };
    let loss = |chosen: &[usize]| -> f64 { items.iter().zip(chosen).map(|(item, &c)| item[c].loss).sum() };
    let mut chosen: Vec<usize> = hulls.iter().map(|hull| hull.first().copied()).collect::<Option<_>>()?;
    let mut spent = cost(&chosen);
    if spent > budget {
        return None;
    }
    let mut steps: Vec<(f64, usize, usize)> = Vec::new();
    for (item, hull) in hulls.iter().enumerate() {
        for (at, pair) in hull.windows(2).enumerate() {
            let (from, to) = (items[item][pair[0]], items[item][pair[1]]);
            steps.push(((from.loss - to.loss) / (to.cost - from.cost) as f64, item, at));
        }
    }
    steps.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
    for (_, item, at) in steps {
        let (from, to) = (hulls[item][at], hulls[item][at + 1]);
        let more = items[item][to].cost - items[item][from].cost;
        // A step stands on those before it.
        if chosen[item] == from && spent + more <= budget {
            chosen[item] = to;
            spent += more;
        }
    }
    let same = items.iter().map(Vec::len).min().unwrap_or(0);
    let uniform = (0..same).map(|choice| vec![choice; items.len()]).filter(|all| cost(all) <= budget);
    let best = uniform.min_by(|a, b| loss(a).total_cmp(&loss(b)));
    Some(match best {
        Some(uniform) if loss(&uniform) < loss(&chosen) => uniform,
        _ => chosen,
    })
}

/// The choices of the lower left hull, by cost.
fn hull(choices: &[Choice]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..choices.len()).collect();
    order.sort_by(|&a, &b| {
        let (x, y) = (choices[a], choices[b]);
        x.cost.cmp(&y.cost).then(x.loss.total_cmp(&y.loss)).then(a.cmp(&b))
    });
    let mut hull: Vec<usize> = Vec::new();
    for next in order {
        let point = choices[next];
        if hull
            .last()
            .is_some_and(|&last| choices[last].cost == point.cost || choices[last].loss <= point.loss)
        {
            continue;
        }
        while let [.., a, b] = hull[..] {
            let (a, b) = (choices[a], choices[b]);
            // b lies on or over the line from a to the new point.
            let slope = |from: Choice, to: Choice| (from.loss - to.loss) / (to.cost - from.cost) as f64;
            if slope(a, b) > slope(b, point) {
                break;
            }
            hull.pop();
        }
        hull.push(next);
    }
    hull
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The least loss of all choices that fit, by trying all.
    fn least(items: &[Vec<Choice>], budget: u64) -> Option<f64> {
        let Some((first, rest)) = items.split_first() else { return Some(0.0) };
        let fits = first.iter().filter(|choice| choice.cost <= budget);
        let losses = fits.filter_map(|choice| Some(choice.loss + least(rest, budget - choice.cost)?));
        losses.min_by(f64::total_cmp)
    }

    fn choice() -> impl Strategy<Value = Choice> {
        (0u64..20, 0u32..1000).prop_map(|(cost, loss)| Choice { cost, loss: f64::from(loss) })
    }

    proptest! {
        #[test]
        fn choices_fit_are_near_the_best_and_never_worse_than_the_same_for_all(
            items in proptest::collection::vec(proptest::collection::vec(choice(), 1..5), 0..6),
            budget in 0u64..80,
        ) {
            let found = allocate(&items, budget);
            let best = least(&items, budget);
            prop_assert_eq!(found.is_some(), best.is_some());
            if let (Some(found), Some(best)) = (found, best) {
                let of = |chosen: &[usize]| {
                    let all = items.iter().zip(chosen).map(|(item, &c)| item[c]);
                    all.fold((0, 0.0), |(cost, loss), c| (cost + c.cost, loss + c.loss))
                };
                let (cost, loss) = of(&found);
                prop_assert!(cost <= budget);
                let step = items.iter().map(|item| {
                    let of = |pick: fn(f64, f64) -> f64| item.iter().map(|c| c.loss).reduce(pick).unwrap_or(0.0);
                    of(f64::max) - of(f64::min)
                });
                prop_assert!(loss <= best + step.fold(0.0, f64::max), "{loss} {best}");
                let choices = items.iter().map(Vec::len).min().unwrap_or(0);
                for same in (0..choices).map(|c| vec![c; items.len()]) {
                    prop_assert!(of(&same).0 > budget || loss <= of(&same).1);
                }
            }
        }
    }
}
