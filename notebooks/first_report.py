# %% [markdown]
# # A network as a sum over paths: a first report
#
# Take a network and real images; compare its tangent kernel Θ with its path kernel Π and data factor A, dense and
# pruned to a tenth of its weights.

# %%
import jax
import pkjax as pk

WIDTH, SAMPLES = 100, 32

digits = pk.data.load("digits", samples=SAMPLES)
module = pk.models.fc(width=WIDTH)
apply_fn, params = pk.from_linen(module, module.init(jax.random.key(0), digits.images))

# %% [markdown]
# Prune without data: SynFlow-L2 scores every weight by the squared path values that run through it.

# %%
ones = pk.ones_input(digits.images.shape[1:])
pruned = pk.prune(lambda p: pk.synflow_l2(apply_fn, p, ones), params, compression=1, steps=100)
print(f"{pruned.kept} of {pruned.total} weights kept")

# %% [markdown]
# Theorem 1's bound per index is false in general; the bounds on sums and products are theorems.

# %%
figures = {}
for name, masks in {"dense": None, "pruned": pruned.masks}.items():
    report = pk.analyze(apply_fn, params, digits.images, masks=masks)
    figures[name] = pk.plots.report(report)
    for claim in report.claims.values():
        print(f"{name:7}{'holds' if claim.holds else 'FAILS':6} {'theorem' if claim.proven else 'claim':8}{claim.text}")
