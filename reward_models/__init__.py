"""How a sample is scored. A reward is a callable `reward(samples) -> Tensor (N,)`; NaN abstains.

`flowrl rewards` lists them. They are imported when they are asked for: most bring a network.
"""

from __future__ import annotations

from flowrl.reward_models.base import (
    FunctionReward,
    Reward,
    RewardError,
    Traits,
    load_reward,
    load_rewards,
    score,
)

_HERE = "flowrl.reward_models"

#: Where rewards are, by the name that a recipe uses.
REWARDS: dict[str, str] = {
    # -- exact
    "tiny_strict": f"{_HERE}.verify:TinyStrict",
    "tiny_dense": f"{_HERE}.verify:TinyDense",
    "tiny_clean": f"{_HERE}.verify:TinyClean",
    "tiny_video_strict": f"{_HERE}.verify_video:TinyVideoStrict",
    "tiny_video_dense": f"{_HERE}.verify_video:TinyVideoDense",
    "tiny_video_part": f"{_HERE}.verify_video:TinyVideoPart",
    "geneval": f"{_HERE}.geneval:GenEval",
    "concept": f"{_HERE}.concepts:Concept",
    "layout": f"{_HERE}.grounding:GaussianLayout",
    "ocr": f"{_HERE}.ocr:OCR",
    # -- preference
    "clip_score": f"{_HERE}.preference:ClipScore",
    "pickscore": f"{_HERE}.preference:PickScore",
    "hpsv2": f"{_HERE}.preference:HPSv2",
    "image_reward": f"{_HERE}.image_reward:ImageReward",
    "aesthetic": f"{_HERE}.preference:Aesthetic",
    "preference": f"{_HERE}.preference:PreferenceModel",
    # -- clips
    "dynamic_degree": f"{_HERE}.video:DynamicDegree",
    "subject_consistency": f"{_HERE}.video:SubjectConsistency",
    "background_consistency": f"{_HERE}.video:BackgroundConsistency",
    "temporal_flicker": f"{_HERE}.video:TemporalFlicker",
    "motion_smoothness": f"{_HERE}.video:MotionSmoothness",
    "video_text": f"{_HERE}.video_text:VideoText",
    "video_transport": f"{_HERE}.video_transport:VideoTransport",
    "video_token_transport": f"{_HERE}.video_transport:VideoTokenTransport",
    "video_reward": f"{_HERE}.video_reward:VideoReward",
    # -- judges
    "judge": f"{_HERE}.judge:YesNo",
    "pairwise": f"{_HERE}.judge:Pairwise",
    "pairwise_rubric": f"{_HERE}.judge:PairwiseRubric",
    "reference_judge": f"{_HERE}.judge:Reference",
    "rubric": f"{_HERE}.judge:Rubric",
    "assessor": f"{_HERE}.judge:Assessor",
    "win_rate": f"{_HERE}.win_rate:WinRate",
    "yes_token": f"{_HERE}.generative:YesToken",
    # -- artifacts, distributions, critics
    "artifact": f"{_HERE}.artifact:ArtifactDetector",
    "adversarial": f"{_HERE}.adversarial:Adversarial",
    "frechet": f"{_HERE}.distribution:Frechet",
    "mmd": f"{_HERE}.distribution:MMD",
    "vendi": f"{_HERE}.distribution:Vendi",
    "transport": f"{_HERE}.transport:Transport",
    "token_transport": f"{_HERE}.transport:TokenTransport",
    "latent": f"{_HERE}.latent:LatentReward",
    # -- made of others
    "ensemble": f"{_HERE}.composite:Ensemble",
    "gate": f"{_HERE}.composite:Gate",
    "tree": f"{_HERE}.composite:Tree",
    "uncertain": f"{_HERE}.uncertainty:Uncertain",
    "region_map": f"{_HERE}.maps:RegionMap",
    "frames": f"{_HERE}.frames:FramesOf",
    "remote": f"{_HERE}.remote:Remote",
    # -- without a model
    "brightness": f"{_HERE}.simple:brightness",
    "jpeg_size": f"{_HERE}.simple:jpeg_size",
}

#: Trained reward models that ship (assets/rewards), for the embedded world.
EMBEDDED = (
    "tiny_clip",
    "tiny_preference",
    "tiny_preference_1",
    "tiny_preference_2",
    "tiny_artifact",
    "tiny_transport",
    "tiny_latent",
    "tiny_yes_token",
    "tiny_video_clip",
    "tiny_video_transport",
    "tiny_video_latent",
)

__all__ = [
    "EMBEDDED",
    "REWARDS",
    "FunctionReward",
    "Reward",
    "RewardError",
    "Traits",
    "load_reward",
    "load_rewards",
    "score",
]
