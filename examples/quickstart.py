"""The main job from Python: one recipe in, one comparison out, then the tuning in use."""

import luthier

recipe = luthier.make_recipe({"task": "support-dialogues", "tunings": ["zero_shot", "lora"]})
report = luthier.run(recipe, "runs/quickstart")
print(report.answer)

session = luthier.Session("runs/quickstart")
dialogue = "Clerk: Good morning.\nAda: My parcel is wet.\nClerk: I'll send a new one today."
print("base:", session.generate([dialogue])[0])
print("lora:", session.generate([dialogue], "lora")[0])
