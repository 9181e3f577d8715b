"""Hydra: aggregator, accumulator and sinks out of a YAML file, and the configuration in the log.

python examples/engines/hydra_mixture.py lr=0.1
python examples/engines/hydra_mixture.py --multirun lr=0.1,0.5
"""

import hydra
import mixture
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf


@hydra.main(version_base=None, config_path=".", config_name="hydra_mixture")
def main(cfg):
    model = instantiate(cfg.model)
    optimizer = torch.optim.SGD(model.parameters(), cfg.lr)
    aggregator, losses = instantiate(cfg.aggregator), instantiate(cfg.losses)
    config = OmegaConf.to_container(cfg, resolve=True)
    with instantiate(cfg.logger)(config=config, total_steps=mixture.STEPS) as logger:
        for step in range(1, mixture.STEPS + 1):
            batch = mixture.batch_of(step, rank=1)
            aggregator.update(batch.pop("metrics"))
            loss = losses.token_loss(model(batch["inputs"]), batch["labels"], batch["dataset"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % mixture.EVERY == 0:
                aggregator.drain(losses)
                logger.log(step, aggregator, prefix="train")


if __name__ == "__main__":
    main()
