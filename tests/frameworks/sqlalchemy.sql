-- SQLAlchemy 2.1.9
-- Run: Base.metadata.create_all(create_mock_engine("postgresql+psycopg://", PRINT), checkfirst=False)
-- Removed: spaces at the ends of lines.
-- The model; PRINT compiles and prints what it is given:
--
--   class Status(Enum):
--       success = "success"
--       failure = "failure"
--       timeout = "timeout"
--
--   class AuditLog(Base):
--       __tablename__ = "audit_log"
--
--       id: Mapped[int] = mapped_column(primary_key=True)
--       actor: Mapped[str]
--       action: Mapped[str] = mapped_column(String(100))
--       started_at: Mapped[datetime] = mapped_column(index=True)
--       completed_at: Mapped[Optional[datetime]]
--       status: Mapped[Optional[Status]]

CREATE TYPE status AS ENUM ('success', 'failure', 'timeout');

CREATE TABLE audit_log (
	id SERIAL NOT NULL,
	actor VARCHAR NOT NULL,
	action VARCHAR(100) NOT NULL,
	started_at TIMESTAMP WITHOUT TIME ZONE NOT NULL,
	completed_at TIMESTAMP WITHOUT TIME ZONE,
	status status,
	PRIMARY KEY (id)
);

CREATE INDEX ix_audit_log_started_at ON audit_log (started_at);
