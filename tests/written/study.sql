BEGIN TRANSACTION;
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('v3.2.0.a');
CREATE TABLE studies (
	study_id INTEGER NOT NULL, 
	study_name VARCHAR(512) NOT NULL, 
	PRIMARY KEY (study_id)
);
INSERT INTO "studies" VALUES(1,'lengths');
CREATE TABLE study_directions (
	study_direction_id INTEGER NOT NULL, 
	direction VARCHAR(8) NOT NULL, 
	study_id INTEGER NOT NULL, 
	objective INTEGER NOT NULL, 
	PRIMARY KEY (study_direction_id), 
	UNIQUE (study_id, objective), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
INSERT INTO "study_directions" VALUES(1,'MINIMIZE',1,0);
CREATE TABLE study_system_attributes (
	study_system_attribute_id INTEGER NOT NULL, 
	study_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (study_system_attribute_id), 
	UNIQUE (study_id, "key"), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
CREATE TABLE study_user_attributes (
	study_user_attribute_id INTEGER NOT NULL, 
	study_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (study_user_attribute_id), 
	UNIQUE (study_id, "key"), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
INSERT INTO "study_user_attributes" VALUES(1,1,'question','"c915c88ebf1670b18166fa9cd7badfd53a7162d5b09b14b70838c603fec7f186"');
INSERT INTO "study_user_attributes" VALUES(2,1,'found','{"schema_version": 1, "versions": {"attention-planner": "0.1.0", "torch": "2.13.0+cpu", "numpy": "2.4.6", "optuna": "5.0.0"}, "calibration": "memory: cpu calibrated with torch 2.13.0+cpu on 2026-11-27; seconds: measured on AMD EPYC, torch 2.13.0+cpu, 2026-11-27T10:23:33+00:00", "seed": 0, "command": "planner tune --vram 64MB --seq 512 --trials 3 --runs 1 --heads 2 --head-dim 16 --dtype float32 --variant dense,dilated", "config": {"schema_version": 1, "variant": "dilated", "segment_lengths": [448, 896, 896], "dilation_rates": [1, 2, 6], "pattern": null, "adaptive": null, "multihead": null, "uncovered": "refuse", "scale": null, "backend": "auto", "workspace_bytes": 16777216, "pool": "auto", "pool_bytes": null, "cache_entries": 100, "cache_bytes": 67108864}, "workload": {"seq": 512, "batch": 1, "heads": 2, "kv_heads": null, "head_dim": 16, "dtype": "float32", "mode": "inference", "causal": false, "weights": false}, "on": "cpu", "budget": 64000000, "reserve": 0, "memory": {"schema_version": 1, "config": {"schema_version": 1, "variant": "dilated", "segment_lengths": [448, 896, 896], "dilation_rates": [1, 2, 6], "pattern": null, "adaptive": null, "multihead": null, "uncovered": "refuse", "scale": null, "backend": "auto", "workspace_bytes": 16777216, "pool": "auto", "pool_bytes": null, "cache_entries": 100, "cache_bytes": 67108864}, "workload": {"seq": 512, "batch": 1, "heads": 2, "kv_heads": null, "head_dim": 16, "dtype": "float32", "mode": "inference", "causal": false, "weights": false}, "on": "cpu", "allocated": 565760, "reserved": 565760, "device": 565760, "needed": 565760, "upper": 569858, "confidence": "99.0% of 112 held-out runs", "components": {"qkv": 196608, "output": 65536, "workspace": 242688, "temp_buffers": 60928}, "at": "forward, branch 1", "lines": [{"name": "q", "component": "qkv", "bytes": 65536, "source": "B S H D e"}, {"name": "k", "component": "qkv", "bytes": 65536, "source": "B S G D e"}, {"name": "v", "component": "qkv", "bytes": 65536, "source": "B S G D e"}, {"name": "out", "component": "output", "bytes": 65536, "source": "B S H D e"}, {"name": "forward arena", "component": "workspace", "bytes": 4096, "source": "attention/ops/reserve.py forward_sizes"}, {"name": "branch 1: part", "component": "temp_buffers", "bytes": 60928, "source": "N T H (D e + w)"}, {"name": "branch 1: scratch", "component": "workspace", "bytes": 238592, "source": "of the kernel, or of the merge"}], "notes": []}, "quality": {"profile": "balanced", "mass": 0.9079728258439709, "layers": 2}, "best": {"number": 1, "config": {"schema_version": 1, "variant": "dilated", "segment_lengths": [448, 896, 896], "dilation_rates": [1, 2, 6], "pattern": null, "adaptive": null, "multihead": null, "uncovered": "refuse", "scale": null, "backend": "auto", "workspace_bytes": 16777216, "pool": "auto", "pool_bytes": null, "cache_entries": 100, "cache_bytes": 67108864}, "kind": "ok", "message": null, "seconds": 0.004679564999605645, "predicted": 0.0010030366423276781, "allocated": 565760, "upper": 569858}, "analytic": {"number": 0, "config": {"schema_version": 1, "variant": "dense", "segment_lengths": [], "dilation_rates": [], "pattern": null, "adaptive": null, "multihead": null, "uncovered": "refuse", "scale": null, "backend": "auto", "workspace_bytes": 1048576, "pool": "auto", "pool_bytes": null, "cache_entries": 100, "cache_bytes": 67108864}, "kind": "ok", "message": null, "seconds": 0.010241153999231756, "predicted": 0.0008290570126249638, "allocated": 537600, "upper": 541698}}');
CREATE TABLE trial_heartbeats (
	trial_heartbeat_id INTEGER NOT NULL, 
	trial_id INTEGER NOT NULL, 
	heartbeat DATETIME NOT NULL, 
	PRIMARY KEY (trial_heartbeat_id), 
	UNIQUE (trial_id), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
CREATE TABLE trial_intermediate_values (
	trial_intermediate_value_id INTEGER NOT NULL, 
	trial_id INTEGER NOT NULL, 
	step INTEGER NOT NULL, 
	intermediate_value FLOAT, 
	intermediate_value_type VARCHAR(7) NOT NULL, 
	PRIMARY KEY (trial_intermediate_value_id), 
	UNIQUE (trial_id, step), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
CREATE TABLE trial_params (
	param_id INTEGER NOT NULL, 
	trial_id INTEGER, 
	param_name VARCHAR(512), 
	param_value FLOAT, 
	distribution_json TEXT, 
	PRIMARY KEY (param_id), 
	UNIQUE (trial_id, param_name), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_params" VALUES(1,1,'kind',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["dense", "dilated"]}}');
INSERT INTO "trial_params" VALUES(2,1,'workspace_log2',20.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 1, "low": 20, "high": 26}}');
INSERT INTO "trial_params" VALUES(3,2,'kind',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["dense", "dilated"]}}');
INSERT INTO "trial_params" VALUES(4,2,'workspace_log2',24.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 1, "low": 20, "high": 26}}');
INSERT INTO "trial_params" VALUES(5,2,'branches',2.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [1, 2, 3, 4]}}');
INSERT INTO "trial_params" VALUES(6,2,'first_segment',449.0,'{"name": "IntDistribution", "attributes": {"log": true, "step": 1, "low": 1, "high": 1024}}');
INSERT INTO "trial_params" VALUES(7,2,'growth_1',42710.0,'{"name": "IntDistribution", "attributes": {"log": true, "step": 1, "low": 1, "high": 65536}}');
INSERT INTO "trial_params" VALUES(8,2,'rate_growth_1',2.0,'{"name": "IntDistribution", "attributes": {"log": true, "step": 1, "low": 1, "high": 16}}');
INSERT INTO "trial_params" VALUES(9,2,'growth_2',5632.0,'{"name": "IntDistribution", "attributes": {"log": true, "step": 1, "low": 1, "high": 65536}}');
INSERT INTO "trial_params" VALUES(10,2,'rate_growth_2',3.0,'{"name": "IntDistribution", "attributes": {"log": true, "step": 1, "low": 1, "high": 16}}');
INSERT INTO "trial_params" VALUES(11,3,'kind',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["dense", "dilated"]}}');
INSERT INTO "trial_params" VALUES(12,3,'workspace_log2',20.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 1, "low": 20, "high": 26}}');
INSERT INTO "trial_params" VALUES(13,3,'branches',2.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [1, 2, 3, 4]}}');
INSERT INTO "trial_params" VALUES(14,3,'first_segment',380.0,'{"name": "IntDistribution", "attributes": {"log": true, "step": 1, "low": 1, "high": 1024}}');
INSERT INTO "trial_params" VALUES(15,3,'growth_1',50940.0,'{"name": "IntDistribution", "attributes": {"log": true, "step": 1, "low": 1, "high": 65536}}');
INSERT INTO "trial_params" VALUES(16,3,'rate_growth_1',8.0,'{"name": "IntDistribution", "attributes": {"log": true, "step": 1, "low": 1, "high": 16}}');
INSERT INTO "trial_params" VALUES(17,3,'growth_2',115.0,'{"name": "IntDistribution", "attributes": {"log": true, "step": 1, "low": 1, "high": 65536}}');
INSERT INTO "trial_params" VALUES(18,3,'rate_growth_2',8.0,'{"name": "IntDistribution", "attributes": {"log": true, "step": 1, "low": 1, "high": 16}}');
INSERT INTO "trial_params" VALUES(19,4,'kind',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["dense", "dilated"]}}');
INSERT INTO "trial_params" VALUES(20,4,'workspace_log2',21.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 1, "low": 20, "high": 26}}');
INSERT INTO "trial_params" VALUES(21,4,'branches',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [1, 2, 3, 4]}}');
INSERT INTO "trial_params" VALUES(22,4,'first_segment',183.0,'{"name": "IntDistribution", "attributes": {"log": true, "step": 1, "low": 1, "high": 1024}}');
INSERT INTO "trial_params" VALUES(23,5,'kind',1.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["dense", "dilated"]}}');
INSERT INTO "trial_params" VALUES(24,5,'workspace_log2',20.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 1, "low": 20, "high": 26}}');
INSERT INTO "trial_params" VALUES(25,5,'branches',3.0,'{"name": "CategoricalDistribution", "attributes": {"choices": [1, 2, 3, 4]}}');
INSERT INTO "trial_params" VALUES(26,5,'first_segment',91.0,'{"name": "IntDistribution", "attributes": {"log": true, "step": 1, "low": 1, "high": 1024}}');
INSERT INTO "trial_params" VALUES(27,5,'growth_1',35.0,'{"name": "IntDistribution", "attributes": {"log": true, "step": 1, "low": 1, "high": 65536}}');
INSERT INTO "trial_params" VALUES(28,5,'rate_growth_1',2.0,'{"name": "IntDistribution", "attributes": {"log": true, "step": 1, "low": 1, "high": 16}}');
INSERT INTO "trial_params" VALUES(29,5,'growth_2',1858.0,'{"name": "IntDistribution", "attributes": {"log": true, "step": 1, "low": 1, "high": 65536}}');
INSERT INTO "trial_params" VALUES(30,5,'rate_growth_2',1.0,'{"name": "IntDistribution", "attributes": {"log": true, "step": 1, "low": 1, "high": 16}}');
INSERT INTO "trial_params" VALUES(31,5,'growth_3',1292.0,'{"name": "IntDistribution", "attributes": {"log": true, "step": 1, "low": 1, "high": 65536}}');
INSERT INTO "trial_params" VALUES(32,5,'rate_growth_3',5.0,'{"name": "IntDistribution", "attributes": {"log": true, "step": 1, "low": 1, "high": 16}}');
INSERT INTO "trial_params" VALUES(33,6,'kind',0.0,'{"name": "CategoricalDistribution", "attributes": {"choices": ["dense", "dilated"]}}');
INSERT INTO "trial_params" VALUES(34,6,'workspace_log2',22.0,'{"name": "IntDistribution", "attributes": {"log": false, "step": 1, "low": 20, "high": 26}}');
CREATE TABLE trial_system_attributes (
	trial_system_attribute_id INTEGER NOT NULL, 
	trial_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (trial_system_attribute_id), 
	UNIQUE (trial_id, "key"), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_system_attributes" VALUES(1,1,'fixed_params','{"kind": "dense", "workspace_log2": 20}');
INSERT INTO "trial_system_attributes" VALUES(2,1,'constraints:memory','-0.9915359837663344');
INSERT INTO "trial_system_attributes" VALUES(3,1,'constraints:mass','-0.19999999999999996');
INSERT INTO "trial_system_attributes" VALUES(4,1,'constraints:reach','0.0');
INSERT INTO "trial_system_attributes" VALUES(5,1,'constraints:runs','0.0');
INSERT INTO "trial_system_attributes" VALUES(6,2,'fixed_params','{}');
INSERT INTO "trial_system_attributes" VALUES(7,2,'constraints:memory','-0.9910959830083959');
INSERT INTO "trial_system_attributes" VALUES(8,2,'constraints:mass','-0.10797282584397083');
INSERT INTO "trial_system_attributes" VALUES(9,2,'constraints:reach','0.0');
INSERT INTO "trial_system_attributes" VALUES(10,2,'constraints:runs','0.0');
INSERT INTO "trial_system_attributes" VALUES(11,3,'fixed_params','{}');
INSERT INTO "trial_system_attributes" VALUES(12,3,'constraints:memory','-0.9917439841246327');
INSERT INTO "trial_system_attributes" VALUES(13,3,'constraints:mass','1.5645791714202772e-05');
INSERT INTO "trial_system_attributes" VALUES(14,3,'constraints:reach','1.0');
INSERT INTO "trial_system_attributes" VALUES(15,4,'fixed_params','{}');
INSERT INTO "trial_system_attributes" VALUES(16,4,'constraints:memory','-0.9933439868807729');
INSERT INTO "trial_system_attributes" VALUES(17,4,'constraints:mass','0.20532977737169156');
INSERT INTO "trial_system_attributes" VALUES(18,4,'constraints:reach','1.0');
INSERT INTO "trial_system_attributes" VALUES(19,5,'fixed_params','{}');
INSERT INTO "trial_system_attributes" VALUES(20,5,'constraints:memory','-0.99331198682565');
INSERT INTO "trial_system_attributes" VALUES(21,5,'constraints:mass','0.26775109789728757');
INSERT INTO "trial_system_attributes" VALUES(22,5,'constraints:reach','1.0');
INSERT INTO "trial_system_attributes" VALUES(23,6,'fixed_params','{}');
INSERT INTO "trial_system_attributes" VALUES(24,6,'constraints:memory','-0.9915359837663344');
INSERT INTO "trial_system_attributes" VALUES(25,6,'constraints:mass','-0.19999999999999996');
INSERT INTO "trial_system_attributes" VALUES(26,6,'constraints:reach','0.0');
INSERT INTO "trial_system_attributes" VALUES(27,6,'constraints:runs','0.0');
CREATE TABLE trial_user_attributes (
	trial_user_attribute_id INTEGER NOT NULL, 
	trial_id INTEGER, 
	"key" VARCHAR(512), 
	value_json TEXT, 
	PRIMARY KEY (trial_user_attribute_id), 
	UNIQUE (trial_id, "key"), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_user_attributes" VALUES(1,1,'owner','"vm 10119 1458256"');
INSERT INTO "trial_user_attributes" VALUES(2,1,'trial','{"number": 0, "config": {"schema_version": 1, "variant": "dense", "segment_lengths": [], "dilation_rates": [], "pattern": null, "adaptive": null, "multihead": null, "uncovered": "refuse", "scale": null, "backend": "auto", "workspace_bytes": 1048576, "pool": "auto", "pool_bytes": null, "cache_entries": 100, "cache_bytes": 67108864}, "kind": "ok", "message": null, "seconds": 0.005070036999313743, "predicted": 0.0008290570126249638, "allocated": 537600, "upper": 541698}');
INSERT INTO "trial_user_attributes" VALUES(3,2,'owner','"vm 10119 1458256"');
INSERT INTO "trial_user_attributes" VALUES(4,2,'trial','{"number": 1, "config": {"schema_version": 1, "variant": "dilated", "segment_lengths": [448, 896, 896], "dilation_rates": [1, 2, 6], "pattern": null, "adaptive": null, "multihead": null, "uncovered": "refuse", "scale": null, "backend": "auto", "workspace_bytes": 16777216, "pool": "auto", "pool_bytes": null, "cache_entries": 100, "cache_bytes": 67108864}, "kind": "ok", "message": null, "seconds": 0.004679564999605645, "predicted": 0.0010030366423276781, "allocated": 565760, "upper": 569858}');
INSERT INTO "trial_user_attributes" VALUES(5,3,'owner','"vm 10119 1458256"');
INSERT INTO "trial_user_attributes" VALUES(6,4,'owner','"vm 10119 1458256"');
INSERT INTO "trial_user_attributes" VALUES(7,5,'owner','"vm 10119 1458256"');
INSERT INTO "trial_user_attributes" VALUES(8,6,'owner','"vm 10119 1458256"');
INSERT INTO "trial_user_attributes" VALUES(9,6,'trial','{"number": 5, "config": {"schema_version": 1, "variant": "dense", "segment_lengths": [], "dilation_rates": [], "pattern": null, "adaptive": null, "multihead": null, "uncovered": "refuse", "scale": null, "backend": "auto", "workspace_bytes": 4194304, "pool": "auto", "pool_bytes": null, "cache_entries": 100, "cache_bytes": 67108864}, "kind": "ok", "message": null, "seconds": 0.003916543999366695, "predicted": 0.0008290570126249638, "allocated": 537600, "upper": 541698}');
CREATE TABLE trial_values (
	trial_value_id INTEGER NOT NULL, 
	trial_id INTEGER NOT NULL, 
	objective INTEGER NOT NULL, 
	value FLOAT, 
	value_type VARCHAR(7) NOT NULL, 
	PRIMARY KEY (trial_value_id), 
	UNIQUE (trial_id, objective), 
	FOREIGN KEY(trial_id) REFERENCES trials (trial_id)
);
INSERT INTO "trial_values" VALUES(1,1,0,-5.28440716371065466461e+00,'FINITE');
INSERT INTO "trial_values" VALUES(2,2,0,-5.36455012217480220471e+00,'FINITE');
INSERT INTO "trial_values" VALUES(3,3,0,-7.08669264603642456989e+00,'FINITE');
INSERT INTO "trial_values" VALUES(4,4,0,-7.32830046464360940206e+00,'FINITE');
INSERT INTO "trial_values" VALUES(5,5,0,-7.02726561394783200142e+00,'FINITE');
INSERT INTO "trial_values" VALUES(6,6,0,-5.54254564686117,'FINITE');
CREATE TABLE trials (
	trial_id INTEGER NOT NULL, 
	number INTEGER, 
	study_id INTEGER, 
	state VARCHAR(8) NOT NULL, 
	datetime_start DATETIME, 
	datetime_complete DATETIME, 
	PRIMARY KEY (trial_id), 
	FOREIGN KEY(study_id) REFERENCES studies (study_id)
);
INSERT INTO "trials" VALUES(1,0,1,'COMPLETE','2026-11-29 21:17:46.226143','2026-11-29 21:17:50.222669');
INSERT INTO "trials" VALUES(2,1,1,'COMPLETE','2026-11-29 21:17:50.344189','2026-11-29 21:17:51.033781');
INSERT INTO "trials" VALUES(3,2,1,'COMPLETE','2026-11-29 21:17:51.161827','2026-11-29 21:17:51.408469');
INSERT INTO "trials" VALUES(4,3,1,'COMPLETE','2026-11-29 21:17:51.537664','2026-11-29 21:17:51.722927');
INSERT INTO "trials" VALUES(5,4,1,'COMPLETE','2026-11-29 21:17:51.871918','2026-11-29 21:17:52.159055');
INSERT INTO "trials" VALUES(6,5,1,'COMPLETE','2026-11-29 21:17:52.284356','2026-11-29 21:17:52.900558');
CREATE TABLE version_info (
	version_info_id INTEGER NOT NULL, 
	schema_version INTEGER, 
	library_version VARCHAR(256), 
	PRIMARY KEY (version_info_id), 
	CHECK (version_info_id=1)
);
INSERT INTO "version_info" VALUES(1,12,'5.0.0');
CREATE UNIQUE INDEX ix_studies_study_name ON studies (study_name);
CREATE INDEX ix_trials_study_id ON trials (study_id);
COMMIT;
